"""Logistic regression with L2 where there are too many rows for the row-space method (`logistic.py`).

The same minimum of C * (sum of log losses) + ||w||^2 / 2, on columns: those of sparse barcodes or of dense tokens, or
those of a factor of the Gram matrix. Few weights are fitted by scikit-learn's Newton method, as L-BFGS would take up to
thousands of steps; more by scipy's L-BFGS, which makes no copy of the columns. Columns are centred (the free intercept
absorbs their mean): L-BFGS then takes a half to an eighth of the steps.

A fit ends where the objective is within 1e-7 of its minimum, relative to itself or to its decrease from w = 0,
whichever is less (so that weak signals are fitted, too). This bound needs no knowledge of the minimum: the objective is
strongly convex in w with constant 1, so it is at most half the squared gradient norm above the minimum. The gradient of
the intercepts is counted in the same way, although the curvature along them may be smaller where classes are separable.
scikit-learn's L-BFGS has no such rule: its tolerance on the gradient is absolute, and at the rule's C it stops with
probabilities that are 0.01 to 0.9 off (docs/log.md).
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
NEWTON_ROWS = 250  # up to here, Newton's method in the row space is exact and fast (docs/log.md)
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

    Memory, beside `x`: about 65 times the weights; with Newton's method up to 100 MB and three times dense columns.

    Parameters
    ----------
    x : (n, m) in float64, a numpy array or scipy CSR matrix
    labels : (n,) in 0..n_classes-1; classes without a row are left out; without any row, nothing is fitted
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
    """Fit on n rows, given their products (n, n) with each other, as `fit_rows`, which is called for few rows.

    Otherwise the columns are those of Z, where K = Z Z^T by a pivoted Cholesky factorisation up to the numerical rank;
    the minimum is the same. So it is for more rows; for few rows with few columns (of latents above a threshold, or
    tokens that are alike), where the system of `fit_rows` is singular but for its 1, and at a large C rounding stops
    Newton's method or makes it slow (docs/log.md); and where `fit_rows` does not converge.
    """
    present = np.unique(labels)
    if len(present) < 2:
        return fit_rows(gram, labels, n_classes, C)
    kernel = gram - gram.mean(0) - gram.mean(1)[:, None] + gram.mean()
    factor, pivots, rank, _ = dpstrf(kernel, lower=1)
    if len(labels) <= NEWTON_ROWS and not _is_narrow(len(labels), rank, (rank + 1) * len(present)):
        found = fit_rows(gram, labels, n_classes, C)
        if found.converged:
            return found
    one_hot, scale = _one_hot(labels, present), _scale(C, present)
    z = np.empty((len(gram), rank))
    z[pivots - 1] = np.tril(factor)[:, :rank]
    search = _Search(z, one_hot, scale)
    weights, intercept, n_steps, converged = search.run()
    dual = np.zeros_like(one_hot)
    dual[pivots[:rank] - 1] = solve_triangular(factor[:rank, :rank], weights, trans="T", lower=True) / scale
    dual -= dual.mean(0)
    intercept = intercept - (scale * gram @ dual).mean(0)
    return RowFit(present, dual, intercept, scale, n_classes, n_steps, converged)


def _is_narrow(n_rows: int, n_columns: int, n_weights: int) -> bool:
    """Whether so few columns beside the rows that Newton's method on them is the fastest way."""
    return 0 < 3 * n_columns <= n_rows and n_weights <= _NEWTON_WEIGHTS


def _one_hot(labels: Ints, present: Ints) -> Float:
    return (labels[:, None] == present).astype(np.float64)


def _scale(C: float, present: Ints) -> float:
    """C, or C / 2 for two classes: scikit-learn has one weight vector for their difference, which is this form."""
    return C if len(present) > 2 else C / 2


class _Search:
    """The objective at a point (weights (m, c), then a row of intercepts of centred columns), and its minimisation.

    Every search starts at zero: a start at the fit of the previous threshold saves a fifth of the steps at best
    (docs/log.md).
    """

    def __init__(self, x: Any, one_hot: Float, scale: float) -> None:
        self.x, self.one_hot, self.scale = x, one_hot, scale
        self.mean: Float = np.asarray(x.mean(0)).ravel()

    def run(self) -> tuple[Float, Float, int, bool]:
        """Weights, intercept, number of steps, and whether the fit converged."""
        begin = np.zeros((self.x.shape[1] + 1, self.one_hot.shape[1]))
        begin[-1] = np.log(self.one_hot.mean(0))
        self._at_zero = self._value(begin.ravel())[0]
        n_rows, n_columns = self.x.shape
        if _is_narrow(n_rows, n_columns, begin.size):
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
        except (LinAlgError, Warning):  # rounding; or a warning, where the caller has made warnings errors
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
        """Whether the last point, where the objective was `value`, is within the tolerance of the minimum."""
        near = max(_GAP * min(value, self._at_zero - value), _ROUNDING * value)
        return float((self._slope**2).sum()) / 2 <= near

    def _look(self, intermediate_result: OptimizeResult) -> None:
        if self._is_near(intermediate_result.fun):
            raise StopIteration
