"""`cytocache.ActivationStore` is `stores.ActivationStore`, the reader of what stage one writes."""

import stores

ActivationStore = stores.ActivationStore
