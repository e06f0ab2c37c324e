"""A flow with one cached task, run by test_results.py in several ways: `cached_flow.py ROOT`."""

import sys
from pathlib import Path

from prefect import flow, task

from sae.store.storage.filesystem import Storage
from tasks.results import result_storage


@task(cache_key_fn=lambda context, parameters: "double-7", persist_result=True, result_serializer="json")
def double(number: int) -> dict[str, int]:
    """Leaves a mark whenever it really runs."""
    with Path(sys.argv[-1]).open("a") as file:
        file.write("x")
    return {"double": 2 * number}


@flow
def cached_flow(root: str) -> str:
    """Returns the name of the state that the task ended in."""
    state = double.with_options(result_storage=result_storage(Storage(root))).submit(7, return_state=True)
    state.result()
    return state.name


if __name__ == "__main__":
    print(cached_flow(sys.argv[1]))
