"""The encoder's product in a training step, p = (x - b_dec) W_enc + b_enc, in the precision of a run (precision.py).

With bfloat16 or float16 operands the bias is part of the product: W_enc gets a few more rows, which hold b_enc as a sum
of three short numbers, and x - b_dec gets ones there. So the bias, too, is added in float32, before p is rounded, and p
is still written once. Rounded to bfloat16 first, a bias of -0.1 would be off by up to 2e-4.
Shapes: B tokens, D width, L latents, C columns of an operand: D, or D and those of the bias.
"""

import torch

from cytosae.sae import SparseAutoencoder

from .precision import Dtypes, product

_PIECES = 3  # three times 8 bits of bfloat16 are the 24 of float32
_MULTIPLE = 16  # of columns: rows that begin at multiples of 32 bytes are read fast


class EncoderProduct:
    """The encoder of a model whose weights do not change meanwhile."""

    def __init__(self, model: SparseAutoencoder, dtypes: Dtypes) -> None:
        self._dtypes, self._width = dtypes, model.width
        self._b_dec_D, self._b_enc_L = model.b_dec.detach(), model.b_enc.detach()
        self._is_exact = dtypes.encoder == model.W_enc.dtype
        self._W_enc_CL = model.W_enc.detach() if self._is_exact else _with_bias(model, dtypes.encoder)

    def operand(self, x_BD: torch.Tensor) -> torch.Tensor:
        """(B, C): x - b_dec in the encoder's type, and ones for the bias."""
        if self._is_exact:
            return torch.sub(x_BD, self._b_dec_D)
        operand_BC = x_BD.new_zeros((len(x_BD), self._W_enc_CL.shape[0]), dtype=self._dtypes.encoder)
        torch.sub(x_BD, self._b_dec_D, out=operand_BC.narrow(1, 0, self._width))  # rounded in the same pass
        operand_BC.narrow(1, self._width, _PIECES).fill_(1)
        return operand_BC

    def centred(self, x_BD: torch.Tensor, operand_BC: torch.Tensor) -> torch.Tensor:
        """(B, D): x - b_dec, no less exact than the other products take it."""
        if self._dtypes.others.itemsize > self._dtypes.encoder.itemsize:
            return torch.sub(x_BD, self._b_dec_D)
        return operand_BC.narrow(1, 0, self._width)

    def pre_activations(self, operand_BC: torch.Tensor, out_BL: torch.Tensor) -> torch.Tensor:
        """p, written into `out`."""
        if self._is_exact:
            return torch.addmm(self._b_enc_L, operand_BC, self._W_enc_CL, out=out_BL)
        return product(operand_BC, self._W_enc_CL, out_BL.dtype, out_BL)

    def of_latents(self, operand_BC: torch.Tensor, latents_K: torch.Tensor) -> torch.Tensor:
        """(B, K): p of some latents, in the type of the weights."""
        W_enc_CK = self._W_enc_CL.index_select(1, latents_K)
        if self._is_exact:
            return torch.addmm(self._b_enc_L[latents_K], operand_BC, W_enc_CK)
        return product(operand_BC, W_enc_CK, self._b_enc_L.dtype)


def _with_bias(model: SparseAutoencoder, dtype: torch.dtype) -> torch.Tensor:
    """(C, L), stored by latent: W_enc, b_enc in pieces, zeros."""
    width = model.width
    n_columns = -(-(width + _PIECES) // _MULTIPLE) * _MULTIPLE
    columns = [model.W_enc.detach().T.to(dtype)]
    rest_L1 = model.b_enc.detach().unsqueeze(1)
    for _ in range(_PIECES):
        columns.append(rest_L1.to(dtype))
        rest_L1 = rest_L1 - columns[-1].to(rest_L1.dtype)
    columns.append(columns[0].new_zeros(model.n_latents, n_columns - width - _PIECES))
    return torch.cat(columns, 1).T
