"""Stage one: images to activations. The module is the address: `from cytocache.extract import extract`."""
