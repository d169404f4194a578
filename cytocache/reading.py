"""The store that stage one writes, at its door: `cytocache.ActivationStore(path)`. Its home is `stores`."""

import stores

ActivationStore = stores.ActivationStore
