from .client import client_or_own as client_or_own
from .client import memory_bytes as memory_bytes
from .client import open_client as open_client
from .workers import Watch as Watch
from .workers import cluster_job as cluster_job
from .workers import prepare_workers as prepare_workers
