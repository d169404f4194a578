"""Stage two: activations to SAE, latents, barcodes and all that is read off them."""

from stores.machine import find_place_for_caches

find_place_for_caches()  # before numba compiles
