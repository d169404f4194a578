"""Logistic regression with L2 where rows are too many for Newton's method on all of them (`logistic.py`).

The same minimum of C * (sum of log losses) + ||w||^2 / 2, on columns: those of sparse barcodes or of dense tokens as
they are, or, where rows are fewer than nonzeros, those of a factor of the Gram matrix. Few weights are found by
Newton's method, as scipy's L-BFGS would take up to thousands of steps; more by L-BFGS, which copies nothing. Columns
count from their mean (the free intercept makes up for it): L-BFGS then takes a half to an eighth of the steps.

The search ends where the objective is within 1e-7 of its minimum, relative to itself or to what was gained on w = 0,
whichever is less (weak signals count, too). That is known without the minimum: the objective bends upwards by at least
1 in every direction of w, so it lies at most half the square of the slope above it. The slope of the intercepts counts
in the same way, though where rows part cleanly the objective may bend less along them.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.linalg import LinAlgError, solve_triangular
from scipy.linalg.lapack import dpstrf
from scipy.optimize import OptimizeResult, minimize
from scipy.sparse import issparse
from sklearn.linear_model import LogisticRegression

from .logistic import RowFit, fit_rows, log_losses, residuals, softmax

Float = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
NEWTON_ROWS = 250  # up to here, Newton's method on rows is exact at little cost (docs/log.md)
_GAP = 1e-7  # between the objective and its minimum, relative
_ROUNDING = 1e-14  # of the objective, relative
_MOST_STEPS = 5000
_NEWTON_WEIGHTS = 2000  # up to here, and with three rows or more per column, Newton's method is faster (docs/log.md)
_MOST_NEWTON_STEPS = 200
_NEWTON_TOLERANCE = 1e-8  # of the gradient
_MEMORY = 30  # steps that L-BFGS remembers


@dataclass(frozen=True)
class ColumnFit:
    """A fitted classifier, for the classes that the training rows have."""

    present: Ints  # (c,) these classes, rising
    weights: Float  # (m, c)
    intercept: Float  # (c,)
    n_classes: int
    n_steps: int
    converged: bool

    def probabilities(self, x: Any) -> Float:
        """(rows, n_classes) of new rows (rows, m); 0 for an unseen class."""
        out = np.zeros((x.shape[0], self.n_classes))
        if len(self.present):
            out[:, self.present] = softmax(x @ self.weights + self.intercept)
        return out


def fit_columns(x: Any, labels: Ints, n_classes: int, C: float) -> ColumnFit:
    """Fit on n rows.

    Memory, beside `x`: about 65 times the weights; where Newton's method serves, 64 MB and three times dense columns.

    Parameters
    ----------
    x : (n, m) in float64, a numpy array or scipy CSR matrix
    labels : (n,) in 0..n_classes-1; classes without a row are left out; without any row nothing is learnt
    C : as in scikit-learn, > 0
    """
    present = np.unique(labels)
    if len(present) < 2:
        nothing = np.zeros((x.shape[1], len(present)))
        return ColumnFit(present, nothing, np.zeros(len(present)), n_classes, n_steps=0, converged=True)
    search = _Search(x, _one_hot(labels, present), _scale(C, present))
    weights, intercept, n_steps, converged = search.run()
    return ColumnFit(present, weights, intercept - search.mean @ weights, n_classes, n_steps, converged)


def fit_gram(gram: Float, labels: Ints, n_classes: int, C: float) -> RowFit:
    """Fit on n rows, given their products (n, n) with each other; otherwise as `fit_rows`, which serves few rows.

    With K = Z Z^T, from a Cholesky factorisation that leaves out what is rounding, Z stands for the rows: as exact.
    """
    present = np.unique(labels)
    if len(labels) <= NEWTON_ROWS or len(present) < 2:
        return fit_rows(gram, labels, n_classes, C)
    one_hot, scale = _one_hot(labels, present), _scale(C, present)
    kernel = gram - gram.mean(0) - gram.mean(1)[:, None] + gram.mean()
    factor, pivots, rank, _ = dpstrf(kernel, lower=1)
    z = np.empty((len(gram), rank))
    z[pivots - 1] = np.tril(factor)[:, :rank]
    search = _Search(z, one_hot, scale)
    weights, intercept, n_steps, converged = search.run()
    dual = np.zeros_like(one_hot)
    dual[pivots[:rank] - 1] = solve_triangular(factor[:rank, :rank], weights, trans="T", lower=True) / scale
    dual -= dual.mean(0)
    intercept = intercept - (scale * gram @ dual).mean(0)
    return RowFit(present, dual, intercept, scale, n_classes, n_steps, converged)


def _one_hot(labels: Ints, present: Ints) -> Float:
    return (labels[:, None] == present).astype(np.float64)


def _scale(C: float, present: Ints) -> float:
    """For two classes scikit-learn has one weight vector, for their difference: that is this form with C / 2."""
    return C if len(present) > 2 else C / 2


class _Search:
    """The objective at a point (weights (m, c), and a row of intercepts for rows from their mean), and the way down.

    From zero: beginning at the fit of the threshold before saves a fifth of the steps at best (docs/log.md).
    """

    def __init__(self, x: Any, one_hot: Float, scale: float) -> None:
        self.x, self.one_hot, self.scale = x, one_hot, scale
        self.mean: Float = np.asarray(x.mean(0)).ravel()

    def run(self) -> tuple[Float, Float, int, bool]:
        """Weights, intercept, number of steps, and whether the end was reached."""
        begin = np.zeros((self.x.shape[1] + 1, self.one_hot.shape[1]))
        begin[-1] = np.log(self.one_hot.mean(0))
        self._at_zero = self._value(begin.ravel())[0]
        n_rows, n_columns = self.x.shape
        if begin.size <= _NEWTON_WEIGHTS and 3 * n_columns <= n_rows:
            found = self._newton()
            if found is not None:
                point, n_steps = found
                return point[:-1], point[-1], n_steps, True
        options = {"maxiter": _MOST_STEPS, "maxfun": 2 * _MOST_STEPS, "maxcor": _MEMORY, "gtol": 0, "ftol": 0}
        end = minimize(self._value, begin.ravel(), jac=True, method="L-BFGS-B", callback=self._look, options=options)
        point = end.x.reshape(begin.shape)
        return point[:-1], point[-1], int(end.nit), self._is_near(self._value(end.x)[0])

    def _newton(self) -> tuple[Float, int] | None:
        """Point and number of steps by scikit-learn's Newton method; None where it does not come near the minimum.

        Columns are scaled by the root of C, and C is 1: the same fit, but then scikit-learn's tolerance, which is
        absolute, means the same at every C.
        """
        x = self.x.toarray() if issparse(self.x) else self.x
        n_classes = self.one_hot.shape[1]
        root = np.sqrt(self.scale if n_classes > 2 else 2 * self.scale)
        model = LogisticRegression(solver="newton-cholesky", tol=_NEWTON_TOLERANCE, max_iter=_MOST_NEWTON_STEPS)
        try:
            model.fit((x - self.mean) * root, self.one_hot.argmax(1))
        except (LinAlgError, Warning):  # rounding; a warning that was made an error, by whoever asked for that
            return None
        weights, intercept = root * model.coef_.T, model.intercept_
        if n_classes == 2:  # one weight vector, for the difference of the two
            weights, intercept = weights * (-0.5, 0.5), intercept * (-0.5, 0.5)
        point = np.vstack([weights, intercept - intercept.mean()])
        value = self._value(point.ravel())[0]
        return (point, int(model.n_iter_.max())) if self._is_near(value) else None

    def _value(self, flat: Float) -> tuple[float, Float]:
        point = flat.reshape(-1, self.one_hot.shape[1])
        weights = point[:-1]
        logits = self.x @ weights + (point[-1] - self.mean @ weights)
        residual = residuals(logits, self.one_hot)[0]
        excess = residual.sum(0)
        slope = np.empty_like(point)
        slope[:-1] = weights - self.scale * (self.x.T @ residual - np.outer(self.mean, excess))
        slope[-1] = -self.scale * excess
        self._slope = slope
        return self.scale * log_losses(logits, self.one_hot) + float((weights**2).sum()) / 2, slope.ravel()

    def _is_near(self, value: float) -> bool:
        """Whether the point that was looked at last, where the objective was `value`, is near enough to the minimum."""
        near = max(_GAP * min(value, self._at_zero - value), _ROUNDING * value)
        return float((self._slope**2).sum()) / 2 <= near

    def _look(self, intermediate_result: OptimizeResult) -> None:
        if self._is_near(intermediate_result.fun):
            raise StopIteration
