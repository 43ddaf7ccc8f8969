"""What the tests of sharded search run in processes of their own.

`python sharded_script.py owner STORE` starts two workers, prints their process ids and waits to be killed.
`python sharded_script.py ray STORE` searches on a Ray cluster of two nodes and prints what it found as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np

from pairdr.errors import PairdrError
from pairdr.indexes import sharded
from pairdr.indexes.sharded import ShardedIndex
from pairdr.store_config import WorkersConfig
from pairdr.vectors import VectorStore


def own_workers(store: VectorStore) -> None:
    index = ShardedIndex(store, 2)
    workers: Any = index.workers
    print(json.dumps([worker._process.pid for worker in workers]), flush=True)
    time.sleep(600)


def search_on_ray(store: VectorStore) -> dict[str, Any]:
    import ray
    import ray._private.state
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    second = cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()
    found: dict[str, Any] = {}
    index = ShardedIndex.open(store, WorkersConfig(on="ray", ray_address=cluster.address, search_threads=1))
    queries = store.take(np.arange(5))
    allowed = np.arange(store.count) % 3 > 0
    workers: Any = index.workers

    def search() -> list[Any]:
        return [part.tolist() for rows in (None, allowed) for part in index.search(queries, 9, rows)]

    def list_nodes() -> list[str]:
        actors = [ray._private.state.actors(worker._actor._actor_id.hex()) for worker in workers]
        return [actor["Address"]["NodeID"] for actor in actors]

    try:
        found["whole"], found["nodes"] = search(), len(set(list_nodes()))
        ray.kill(workers[1]._actor)
        found["actor lost"] = search()
        cluster.remove_node(second, allow_graceful=False)
        found["node lost"] = search()
        sharded.START_SECONDS = 3.0
        try:
            ShardedIndex.open(store, WorkersConfig(on="ray", search_workers=2, search_threads=50))
        except PairdrError as error:
            found["no room"] = error.what
        index.close()
    finally:
        ray.shutdown()
        cluster.shutdown()
    return found


if __name__ == "__main__":
    mode, opened = sys.argv[1], VectorStore(sys.argv[2])
    if mode == "owner":
        own_workers(opened)
    else:
        print(json.dumps(search_on_ray(opened)))
