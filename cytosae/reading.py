"""The stores that stage two reads, at its door: `cytosae.BarcodeStore(path).read("patient")`. They live in `stores`."""

import stores

ActivationStore = stores.ActivationStore
BarcodeStore = stores.BarcodeStore
ConceptStore = stores.ConceptStore
LatentStore = stores.LatentStore
