"""Slow, obvious twins of the project's fast code: numpy float64, gradients derived by hand, no autograd.

Symbols: x (n, D) tokens, S latents, W_enc (D, S), b_enc (S,), W_dec (S, D), b_dec (D,).

    p = (x - b_dec) W_enc + b_enc ;  h = relu(p) ;  x_hat = h W_dec + b_dec

Every division by a token's norm (||x[t]|| in M, ||r[t]|| in the ghost's G) uses max(norm, 1e-12), as
torch.clamp_min(1e-12) does, so that a zero token divides by 1e-12 and not by zero. Nothing here changes
its arguments.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]
Array = npt.NDArray[Any]

OBJECTIVES = ("cytosae", "default", "paper")
TOKEN_SETS = ("all", "patch", "cls")
NORM_FLOOR = 1e-12  # clamp of ||x[t]|| and ||r[t]|| where they divide
GHOST_EPS = 1e-6  # in the denominators of a and of c


@dataclass(frozen=True)
class Params:
    """W_enc (D, S), b_enc (S,), W_dec (S, D), b_dec (D,); also used for gradients and Adam's moments."""

    W_enc: Float
    b_enc: Float
    W_dec: Float
    b_dec: Float


@dataclass(frozen=True)
class Reference:
    """Loss, its three parts (loss = mse + l1 + ghost; l1 includes lambda), and the loss's gradients."""

    loss: float
    mse: float
    l1: float
    ghost: float
    grads: Params


@dataclass(frozen=True)
class AdamState:
    """First and second moments, and the number of updates made so far."""

    m: Params
    v: Params
    count: int


# --------------------------------------------------------------------------------------------------
# The autoencoder: forward, loss, gradients
# --------------------------------------------------------------------------------------------------


def norm(vector: Array) -> float:
    """Euclidean norm of all the entries of an array (of any shape)."""
    return math.sqrt(float(np.sum(np.asarray(vector, dtype=np.float64) ** 2)))


def float64_params(params: Params) -> Params:
    """The same parameters, copied to float64."""
    return Params(
        np.array(params.W_enc, dtype=np.float64),
        np.array(params.b_enc, dtype=np.float64),
        np.array(params.W_dec, dtype=np.float64),
        np.array(params.b_dec, dtype=np.float64),
    )


def zeros_like(params: Params) -> Params:
    """Zeros of the same four shapes."""
    return Params(
        np.zeros(params.W_enc.shape),
        np.zeros(params.b_enc.shape),
        np.zeros(params.W_dec.shape),
        np.zeros(params.b_dec.shape),
    )


def sae_forward(params: Params, x: Array) -> tuple[Float, Float, Float]:
    """x (n, D) -> p (n, S), h (n, S), x_hat (n, D)."""
    params = float64_params(params)
    x = np.asarray(x, dtype=np.float64)
    p = (x - params.b_dec) @ params.W_enc + params.b_enc
    h = np.where(p > 0, p, 0.0)
    x_hat = h @ params.W_dec + params.b_dec
    return p, h, x_hat


def sae_loss_and_gradients(
    params: Params, x: Array, *, objective: str, l1: float, dead: Array | None = None
) -> Reference:
    """Loss and gradients of one batch. x (n, D); l1 is lambda; dead (S,) boolean, None for no dead latents.

    With e = x_hat - x, r = -e, K the dead latents (the ghost is 0 when K is empty):

        M[t] = w_M[t] e[t]^2                      w_M = 1/||x[t]||, or D for "paper"
        g[t] = exp(p[t,K]) W_dec[K]
        a[t] = ||r[t]|| / (1e-6 + 2 ||g[t]||)     detached; no clamp, its denominator is never 0
        G[t] = w_G[t] (a[t] g[t] - r[t])^2        w_G = 1/||r[t]||, or D for "paper"; r detached
        c    = M / (G + 1e-6) element-wise for "cytosae", mean(M) / (mean(G) + 1e-6) otherwise; detached
        loss = mean(M) + l1 mean_t sum_s |h[t,s]| + mean(c G)

    Detached, so held constant below: r, a, w_G, c. Not detached: exp(p[:,K]) (and in it x - b_dec) and
    W_dec[K]. So the ghost moves W_dec[K], W_enc[:,K], b_enc[K], and b_dec only through p.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective {objective!r} is none of {OBJECTIVES}")
    params = float64_params(params)
    x = np.asarray(x, dtype=np.float64)
    n, D = x.shape
    S = params.b_enc.shape[0]
    p, h, x_hat = sae_forward(params, x)
    grads = zeros_like(params)  # filled in place below

    # Reconstruction and sparsity, token by token.
    M = np.zeros((n, D))
    sparsity = 0.0
    for t in range(n):
        e = x_hat[t] - x[t]
        w_M = float(D) if objective == "paper" else 1.0 / max(norm(x[t]), NORM_FLOOR)
        M[t] = w_M * e**2
        sparsity += float(np.sum(np.abs(h[t])))

        d_x_hat = 2.0 * w_M * e / (n * D)
        d_h = params.W_dec @ d_x_hat + l1 / n  # d|h|/dh = 1 where the latent is on; off is masked next
        d_p = np.where(p[t] > 0, d_h, 0.0)  # torch's relu: gradient 0 at p = 0
        # x_hat = h W_dec + b_dec
        grads.W_dec[:] += np.outer(h[t], d_x_hat)
        grads.b_dec[:] += d_x_hat
        # p = (x - b_dec) W_enc + b_enc
        grads.W_enc[:] += np.outer(x[t] - params.b_dec, d_p)
        grads.b_enc[:] += d_p
        grads.b_dec[:] -= params.W_enc @ d_p
    mse = float(np.mean(M))
    l1_term = l1 * sparsity / n

    ghost = 0.0
    if dead is not None:
        mask = np.asarray(dead)
        if mask.shape != (S,) or mask.dtype != np.bool_:
            raise ValueError(f"dead must be a boolean mask of shape ({S},)")
        K = [int(s) for s in np.flatnonzero(mask)]
        if K:
            ghost = _add_ghost(grads, params, x, p, x_hat, M, K, objective)

    return Reference(mse + l1_term + ghost, mse, l1_term, ghost, grads)


def _add_ghost(
    grads: Params, params: Params, x: Float, p: Float, x_hat: Float, M: Float, K: list[int], objective: str
) -> float:
    """Returns mean(c G) and adds its gradients to grads, in place. Formulas: sae_loss_and_gradients."""
    n, D = x.shape
    G = np.zeros((n, D))
    g = np.zeros((n, D))
    a = np.zeros(n)
    w_G = np.zeros(n)
    for t in range(n):
        r = x[t] - x_hat[t]
        for s in K:
            g[t] += math.exp(p[t, s]) * params.W_dec[s]
        a[t] = norm(r) / (GHOST_EPS + 2.0 * norm(g[t]))
        w_G[t] = float(D) if objective == "paper" else 1.0 / max(norm(r), NORM_FLOOR)
        G[t] = w_G[t] * (a[t] * g[t] - r) ** 2

    if objective == "cytosae":
        c = M / (G + GHOST_EPS)  # one factor per token and dimension
    else:
        c = np.full((n, D), np.mean(M) / (np.mean(G) + GHOST_EPS))  # one factor for the batch

    for t in range(n):
        r = x[t] - x_hat[t]
        d_g = c[t] * w_G[t] * 2.0 * (a[t] * g[t] - r) * a[t] / (n * D)
        for s in K:
            exp_p = math.exp(p[t, s])
            # g = sum over K of exp(p_s) W_dec[s]
            grads.W_dec[s] += exp_p * d_g
            d_p = exp_p * float(d_g @ params.W_dec[s])
            # p_s = (x - b_dec) W_enc[:, s] + b_enc[s]
            grads.W_enc[:, s] += d_p * (x[t] - params.b_dec)
            grads.b_enc[s] += d_p
            grads.b_dec[:] -= d_p * params.W_enc[:, s]
    return float(np.mean(c * G))


# --------------------------------------------------------------------------------------------------
# One optimiser step, and folding the decoder's norms
# --------------------------------------------------------------------------------------------------


def normalise_decoder(params: Params) -> Params:
    """Rows of W_dec divided by their norm; nothing else changes (so x_hat does). Zero rows stay zero."""
    params = float64_params(params)
    for s in range(params.W_dec.shape[0]):
        length = norm(params.W_dec[s])
        if length > 0:
            params.W_dec[s] /= length
    return params


def fold_decoder_norm(params: Params) -> Params:
    """Rows of W_dec to norm 1, the norm moved into W_enc[:, s] and b_enc[s]: x_hat is unchanged.

    relu(c p) = c relu(p) for c > 0. Zero rows are left as they are, with their encoder column and bias.
    """
    params = float64_params(params)
    for s in range(params.W_dec.shape[0]):
        length = norm(params.W_dec[s])
        if length > 0:
            params.W_dec[s] /= length
            params.W_enc[:, s] *= length
            params.b_enc[s] *= length
    return params


def adam_start(params: Params) -> AdamState:
    """Adam before its first update."""
    return AdamState(zeros_like(params), zeros_like(params), 0)


def adam_update(value: Float, grad: Float, m: Float, v: Float, count: int, lr: float) -> tuple[Float, Float, Float]:
    """One array's update number `count` (from 1): new value, m, v. Betas 0.9 / 0.999, eps 1e-8."""
    m = 0.9 * m + 0.1 * grad
    v = 0.999 * v + 0.001 * grad**2
    m_unbiased = m / (1.0 - 0.9**count)
    v_unbiased = v / (1.0 - 0.999**count)
    return value - lr * m_unbiased / (np.sqrt(v_unbiased) + 1e-8), m, v  # eps outside the root, as torch


def released_step(
    params: Params,
    adam_state: AdamState,
    x: Array,
    *,
    objective: str,
    l1: float,
    lr: float,
    warmup_steps: int,
    step: int,
    steps_since_fired: Array,
    dead_after: int = 64,
) -> tuple[Params, AdamState, Int]:
    """One whole optimiser step on the batch x (n, D); steps_since_fired (S,); step counted from 0.

    The returned decoder rows are as Adam left them; the next step brings them to norm 1 first.
    """
    # 1. decoder rows to norm 1
    params = normalise_decoder(params)

    # 2. dead set, from the counters as they were before this batch
    since = np.array(steps_since_fired, dtype=np.int64)
    dead = since > dead_after

    # 3. forward, loss, gradients
    _, h, _ = sae_forward(params, x)
    grads = sae_loss_and_gradients(params, x, objective=objective, l1=l1, dead=dead).grads

    # 4. counters
    since = since + 1
    since[np.any(h > 0, axis=0)] = 0

    # 5. drop from each decoder row's gradient its component along the (unit) row
    for s in range(params.W_dec.shape[0]):
        row = params.W_dec[s]
        grads.W_dec[s] -= float(grads.W_dec[s] @ row) * row

    # 6. Adam, with the learning rate warmed up linearly
    factor = 1.0 if warmup_steps == 0 else min(1.0, (step + 1) / warmup_steps)
    rate, count, m, v = lr * factor, adam_state.count + 1, adam_state.m, adam_state.v
    W_enc = adam_update(params.W_enc, grads.W_enc, m.W_enc, v.W_enc, count, rate)
    b_enc = adam_update(params.b_enc, grads.b_enc, m.b_enc, v.b_enc, count, rate)
    W_dec = adam_update(params.W_dec, grads.W_dec, m.W_dec, v.W_dec, count, rate)
    b_dec = adam_update(params.b_dec, grads.b_dec, m.b_dec, v.b_dec, count, rate)
    new_params, new_m, new_v = (Params(W_enc[i], b_enc[i], W_dec[i], b_dec[i]) for i in range(3))
    return new_params, AdamState(new_m, new_v, count), since


# --------------------------------------------------------------------------------------------------
# Geometric medians
# --------------------------------------------------------------------------------------------------


def geometric_median(x: Array, n_iter: int = 100, floor: float = 1e-6) -> Float:
    """Weiszfeld over the rows of x (n, D) -> (D,): from the mean, weights 1/max(dist, floor)."""
    x = np.asarray(x, dtype=np.float64)
    median: Float = np.mean(x, axis=0)
    for _ in range(n_iter):
        weights = [1.0 / max(norm(row - median), floor) for row in x]
        total = np.zeros(x.shape[1])
        for weight, row in zip(weights, x, strict=True):
            total += weight * row
        median = total / sum(weights)
    return median


def geometric_median_per_position(x: Array) -> Float:
    """x (images, T, D) -> (D,): m (T, D) minimising sum_i ||X_i - m||_Frobenius, then its mean over T.

    One distance per image, over all its positions at once. Weiszfeld from the mean, 100 rounds, weights
    1/max(dist, 1e-6).
    """
    x = np.asarray(x, dtype=np.float64)
    median: Float = np.mean(x, axis=0)
    for _ in range(100):
        weights = [1.0 / max(norm(image - median), 1e-6) for image in x]
        total = np.zeros(x.shape[1:])
        for weight, image in zip(weights, x, strict=True):
            total += weight * image
        median = total / sum(weights)
    return np.asarray(np.mean(median, axis=0), dtype=np.float64)


# --------------------------------------------------------------------------------------------------
# Rounding
# --------------------------------------------------------------------------------------------------


def round_mantissa_scalar(value: float, bits: int) -> float:
    """One float32 value (as a Python float, exact) to `bits` mantissa bits, nearest even."""
    if value == 0 or math.isinf(value) or math.isnan(value):
        return value
    _, exponent = math.frexp(value)  # |value| = f 2^exponent, 1/2 <= f < 1, so 1.xxx 2^(exponent - 1)
    # The spacing of numbers with `bits` mantissa bits; float32's range has no exponent below -126, so
    # subnormals are all spaced alike.
    spacing = max(exponent - 1, -126) - bits
    # A power of two scales exactly, and Python's round is exact with ties to even.
    rounded = math.ldexp(float(round(math.ldexp(value, -spacing))), spacing)
    if abs(rounded) >= 2.0**128:  # rounded up past float32's largest number
        rounded = math.inf
    return math.copysign(rounded, value)  # keeps -0


def round_mantissa(v: Array, bits: int) -> npt.NDArray[np.float32]:
    """float32 array (any shape) rounded to `bits` (1..23) explicit mantissa bits, nearest even -> float32.

    The exponent keeps float32's 8 bits (bits=7 is bfloat16, 10 is TF32, 23 the identity). As in IEEE, what
    rounds up past the largest number is infinite. Infinities, NaN and the sign of zero are kept.
    """
    v = np.asarray(v)
    if v.dtype != np.float32:
        raise TypeError(f"round_mantissa takes float32, not {v.dtype}")
    if not 1 <= bits <= 23:
        raise ValueError(f"bits must be 1..23, not {bits}")
    flat = [round_mantissa_scalar(float(value), bits) for value in v.ravel()]
    return np.array(flat, dtype=np.float32).reshape(v.shape)


# --------------------------------------------------------------------------------------------------
# Barcodes: tokens -> images -> patients -> diseases
# --------------------------------------------------------------------------------------------------


def images_of(dense_latents: Array, tokens_per_image: int, token_set: str) -> list[Array]:
    """dense (n_images*T, S) -> one array (tokens of the set, S) per image; token 0 of an image is CLS."""
    if token_set not in TOKEN_SETS:
        raise ValueError(f"token_set {token_set!r} is none of {TOKEN_SETS}")
    rows = len(dense_latents)
    if rows % tokens_per_image:
        raise ValueError(f"{rows} rows are not a whole number of images of {tokens_per_image} tokens")
    keep = {"all": slice(None), "patch": slice(1, None), "cls": slice(0, 1)}[token_set]
    return [dense_latents[i : i + tokens_per_image][keep] for i in range(0, rows, tokens_per_image)]


def image_counts(dense_latents: Array, tau: float, tokens_per_image: int, token_set: str) -> Int:
    """dense (n_images*T, S) float32 -> (n_images, S): how many of the set's tokens are > tau, in float32."""
    dense_latents = np.asarray(dense_latents)
    if dense_latents.dtype != np.float32:
        raise TypeError(f"image_counts takes float32, not {dense_latents.dtype}")
    images = images_of(dense_latents, tokens_per_image, token_set)
    counts = np.zeros((len(images), dense_latents.shape[1]), dtype=np.int64)
    for i, image in enumerate(images):
        for token in image:
            counts[i] += token > np.float32(tau)
    return counts


def value_counts(dense_latents: Array, tokens_per_image: int, token_set: str) -> tuple[dict[float, int], Float]:
    """(value -> how often it is stored at a token of the set, (S,) largest value of each latent; 0 where none)."""
    counts: dict[float, int] = {}
    largest = np.zeros(np.asarray(dense_latents).shape[1])
    for image in images_of(dense_latents, tokens_per_image, token_set):
        for token in image:
            for s, value in enumerate(token):
                if value > 0:
                    counts[float(value)] = counts.get(float(value), 0) + 1
                    largest[s] = max(largest[s], value)
    return counts, largest


def image_max(dense_latents: Array, tokens_per_image: int, token_set: str) -> Float:
    """dense (n_images*T, S) -> (n_images, S): the largest value over the set's tokens."""
    images = images_of(np.asarray(dense_latents, dtype=np.float64), tokens_per_image, token_set)
    return np.array([np.max(image, axis=0) for image in images])


def image_mean(dense_latents: Array, tokens_per_image: int, token_set: str) -> Float:
    """dense (n_images*T, S) -> (n_images, S): the mean over the set's tokens, summed in float64."""
    images = images_of(np.asarray(dense_latents, dtype=np.float64), tokens_per_image, token_set)
    return np.array([np.mean(image, axis=0) for image in images])


def label_entropy(values: Sequence[float] | Array, labels: Sequence[int] | Array, min_support: int = 1) -> float:
    """Of one latent, in nats: an image with a value and a label weighs as much as its value; NaN below the support."""
    kept = [(value, label) for value, label in zip(values, labels, strict=True) if value > 0 and label >= 0]
    if len(kept) < max(1, min_support):
        return float("nan")
    total = sum(value for value, _ in kept)
    shares = [sum(v for v, found in kept if found == label) / total for label in {found for _, found in kept}]
    return -sum(share * np.log(share) for share in shares)


def top_images(values: Sequence[float] | Array, ids: Sequence[str], k: int) -> list[int]:
    """Positions of the k largest values above 0, of equal ones the image with the smaller id first."""
    return sorted((i for i, value in enumerate(values) if value > 0), key=lambda i: (-values[i], ids[i]))[:k]


def patient_barcodes(counts: Array, readable: Array, patients: Sequence[str | None]) -> tuple[list[str], Float, Int]:
    """Mean over a patient's readable images.

    counts (n_images, S), readable (n_images,) boolean, patients one name per image (None: nobody's image).
    Returns the sorted names, (P, S) means, and (P,) numbers of images averaged. A patient without a
    readable image has no mean and is left out.
    """
    counts = np.asarray(counts)
    if not len(counts) == len(readable) == len(patients):
        raise ValueError("counts, readable and patients must have one entry per image")
    images: dict[str, list[int]] = {}
    for i, patient in enumerate(patients):
        if patient is not None and readable[i]:
            images.setdefault(patient, []).append(i)
    names = sorted(images)
    matrix = np.zeros((len(names), counts.shape[1]))
    for k, name in enumerate(names):
        for i in images[name]:
            matrix[k] += counts[i]
        matrix[k] /= len(images[name])
    return names, matrix, np.array([len(images[name]) for name in names], dtype=np.int64)


def disease_barcodes(patient_matrix: Array, patient_diseases: Sequence[str | None]) -> tuple[list[str], Float]:
    """Mean over a disease's patients, each patient once however many images.

    patient_matrix (P, S), patient_diseases one name per patient (None: left out). Returns the sorted
    names and (diseases, S) means.
    """
    patient_matrix = np.asarray(patient_matrix, dtype=np.float64)
    if len(patient_matrix) != len(patient_diseases):
        raise ValueError("patient_diseases must have one entry per patient")
    names = sorted({disease for disease in patient_diseases if disease is not None})
    matrix = np.zeros((len(names), patient_matrix.shape[1]))
    for k, name in enumerate(names):
        members = [i for i, disease in enumerate(patient_diseases) if disease == name]
        for i in members:
            matrix[k] += patient_matrix[i]
        matrix[k] /= len(members)
    return names, matrix


# --------------------------------------------------------------------------------------------------
# Explained variance
# --------------------------------------------------------------------------------------------------


def explained_variance(x: Array, x_hat: Array) -> tuple[float, float]:
    """x, x_hat (n, D) -> (centred, uncentred): 1 - squared error / squared norm of x about its mean or 0.

    The mean is over tokens, one per dimension.
    """
    x = np.asarray(x, dtype=np.float64)
    x_hat = np.asarray(x_hat, dtype=np.float64)
    error = norm(x_hat - x) ** 2
    return 1.0 - error / norm(x - np.mean(x, axis=0)) ** 2, 1.0 - error / norm(x) ** 2
