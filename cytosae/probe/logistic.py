"""Logistic regression with L2 in the row space: exact, at a cost that depends on the number of rows alone.

What scikit-learn's LogisticRegression minimises, C * (sum of log losses) + ||w||^2 / 2 with a free intercept, has its
minimum at w = C X^T a, with one number a[i, k] per training row and class. So it depends on X (n, M) through the Gram
matrix X X^T (n, n) alone. With n << M, many fits are cheap: one for every threshold, fold and permutation. For two
classes scikit-learn has one weight vector for the difference; that is this form with C / 2.

Why not scikit-learn on a factor of the Gram matrix: at the C that the rule gives, classes are separable and its solvers
stop too early (L-BFGS 0.01 to 0.9 off in probability), or take three to eight times as long (newton-cholesky):
docs/log.md.

Newton's method, damped. With K = C X X^T, logits f = K a + b and W the Hessian of the log loss, a step solves

    (I + W K) da + W 1 db = (y - p) - a ,    1^T (a + da) = 0 for every class

W = diag(p) - P P^T couples the classes; Rasmussen and Williams (Gaussian Processes for Machine Learning, section 3.5)
split the system into one n x n inverse per class and one system for their sum.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
_DONE = 1e-7  # largest change of a logit in the last full step
_NEAR = 0.3  # after a step that changed no logit by more, its Hessian is reused, as long as steps shrink as fast
_MOST_STEPS = 100
_SUFFICIENT = 1e-4  # Armijo: share of the decrease that the slope predicts
_ROUNDING = 1e-10  # of the objective, relative
_SCALES = (2.0, 6.0, 12.0, 18.0)  # sizes of logits that are tried for the warm start


@dataclass(frozen=True)
class RowFit:
    """A fitted classifier: w = C X^T `dual`, for the classes that the training rows have."""

    present: Ints  # (c,) these classes, rising
    dual: Float  # (n, c)
    intercept: Float  # (c,)
    scale: float  # C, or C / 2 for two classes
    n_classes: int
    n_steps: int
    converged: bool

    def probabilities(self, gram: Float) -> Float:
        """(rows, n_classes) from the products (rows, n) of new rows with the training rows; 0 for an unseen class."""
        out = np.zeros((len(gram), self.n_classes))
        if len(self.present):
            out[:, self.present] = softmax(self.scale * (gram @ self.dual) + self.intercept)
        return out


def fit_rows(gram: Float, labels: Ints, n_classes: int, C: float) -> RowFit:
    """Fit on n rows, given their products with each other.

    Parameters
    ----------
    gram : (n, n) X X^T in float64
    labels : (n,) in 0..n_classes-1; classes without a row are left out; without any row nothing is learnt
    C : as in scikit-learn, > 0
    """
    present = np.unique(labels)
    one_hot = (labels[:, None] == present).astype(np.float64)
    scale = C if len(present) > 2 else C / 2
    if len(present) < 2:
        return RowFit(
            present, np.zeros_like(one_hot), np.zeros(len(present)), scale, n_classes, n_steps=0, converged=True
        )
    # rows are centred: the free intercept absorbs their mean, and the problem is better conditioned
    kernel = scale * (gram - gram.mean(0) - gram.mean(1)[:, None] + gram.mean())
    dual, intercept = _warm_start(kernel, one_hot)
    pull = kernel @ dual  # logits without the intercept
    value = _objective(pull + intercept, dual, pull, one_hot)
    converged, n_steps, before, moved = False, 0, 1.0, np.inf
    while not converged and n_steps < _MOST_STEPS:
        residual, p = residuals(pull + intercept, one_hot)
        if moved > _NEAR * min(1.0, before):
            hessian = _Inverse(kernel, p)
        step, shift = hessian.solve(residual - dual, dual.sum(0))
        move = kernel @ step
        slope = float(-((residual - dual) * move).sum() - residual.sum(0) @ shift)
        length = 1.0
        while length > 1e-8:
            new = _objective(
                pull + length * move + intercept + length * shift, dual + length * step, pull + length * move, one_hot
            )
            if new <= value + _SUFFICIENT * length * slope + _ROUNDING * value:
                break
            length /= 2
        else:
            break  # no smaller objective along this step: not converged
        dual, intercept, pull, value = dual + length * step, intercept + length * shift, pull + length * move, new
        before, moved = moved, float(np.abs(move + shift).max()) if length == 1 else np.inf
        converged = moved < _DONE
        n_steps += 1
    intercept = intercept - (scale * gram @ dual).mean(0)  # for rows that are not centred
    return RowFit(present, dual, intercept, scale, n_classes, n_steps=n_steps, converged=converged)


def softmax(logits: Float) -> Float:
    """(rows, classes) probabilities."""
    shares: Float = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    return shares


def log_losses(logits: Float, one_hot: Float) -> float:
    """Sum of the log losses; accurate for losses near 0, too."""
    above = logits - (logits * one_hot).sum(1, keepdims=True)
    above[one_hot > 0] = -np.inf
    top = above.max(1)
    return float(np.logaddexp(0, top + np.log(np.exp(above - top[:, None]).sum(1))).sum())


def residuals(logits: Float, one_hot: Float) -> tuple[Float, Float]:
    """y - p (rows, classes), and p; 1 - p is summed from the other classes, which does not cancel near 1."""
    p = softmax(logits)
    residual = -p
    residual[one_hot > 0] = (p * (1 - one_hot)).sum(1)
    return residual, p


def _warm_start(kernel: Float, one_hot: Float) -> tuple[Float, Float]:
    """A start for Newton's method: ridge regression of the classes at the best of some scales, or zero.

    It changes the time, not the result. With fewer rows than columns the minimum is far from zero, and Newton's method
    from zero would take about one step per unit of the logits.
    """
    shares = one_hot.mean(0)
    ridge = np.linalg.solve(kernel + np.eye(len(kernel)), one_hot - shares)
    ridge -= ridge.mean(0)
    pull, intercept = kernel @ ridge, np.log(shares)
    values = [_objective(s * pull + intercept, s * ridge, s * pull, one_hot) for s in (0.0, *_SCALES)]
    return (0.0, *_SCALES)[int(np.argmin(values))] * ridge, intercept


def _objective(logits: Float, dual: Float, pull: Float, one_hot: Float) -> float:
    """Log losses and penalty, both divided by C."""
    return log_losses(logits, one_hot) + float((dual * pull).sum() / 2)


class _Inverse:
    """I + W K at given probabilities, factored so that systems with it are cheap to solve."""

    def __init__(self, kernel: Float, p: Float) -> None:
        root = np.sqrt(p).T  # (c, n)
        inner = root[:, :, None] * kernel * root[:, None, :]
        inner[:, range(len(p)), range(len(p))] += 1
        self._kernel = kernel
        self._each = root[:, :, None] * np.linalg.inv(inner) * root[:, None, :]  # (c, n, n)
        self._sum_inverse = np.linalg.inv(self._each.sum(0))
        self._ones = self._each.sum(2).T  # (n, c)
        self._shared = self._sum_inverse @ self._ones
        self._balance = np.diag(self._ones.sum(0)) - self._ones.T @ self._shared
        # singular along equal shifts of all intercepts; this keeps the shift at 0
        self._balance += self._balance.diagonal().mean()

    def solve(self, gap: Float, excess: Float) -> tuple[Float, Float]:
        """Steps of dual (n, c) and intercept (c,) that close `gap` and undo the `excess` (c,) of the dual's sums."""
        pulled = self._times_each(self._kernel @ gap)
        free = gap - pulled + self._times_each(self._sum_inverse @ pulled.sum(1, keepdims=True))
        shift = np.linalg.solve(self._balance, excess + free.sum(0))
        step = free - self._ones * shift + self._times_each((self._shared @ shift)[:, None])
        return step, shift

    def _times_each(self, columns: Float) -> Float:
        """Each class's matrix times its column, or times the one column."""
        stacked = self._each @ columns.T[:, :, None]
        product: Float = stacked[:, :, 0].T
        return product
