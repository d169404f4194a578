"""Stage two: activations to SAE, latents and barcodes. The module is the address: `from cytosae.train import train`."""
