"""The atlas: a static site of an SAE's concepts, and their review by experts. No torch."""
