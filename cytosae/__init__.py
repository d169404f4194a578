"""Stage two: activations to SAE, latents and barcodes. The module is the address: `from cytosae.training.train import train`."""

from cyto_machine import find_place_for_caches

find_place_for_caches()  # before numba compiles
