"""Where the results of an MLflow experiment lie on this machine."""

from __future__ import annotations

from pathlib import Path

from studytool.study.tracking import store


def folder_of_experiment(uri: str, name: str) -> Path | None:
    """The folder of the study that the experiment `name` belongs to; None where there is no such experiment or folder.

    A store that does not exist is not made.

    Raises:
        StudytoolError: the address is none, or the store cannot be read.
    """
    address = store.absolute_uri(uri)
    path = store.sqlite_path(address)
    if path is not None and not path.is_file():
        return None
    client = store.open_client(address)
    with store.explained(address):
        experiment = client.get_experiment_by_name(name)
    if experiment is None:
        return None
    folder = Path(experiment.tags.get(store.FOLDER_TAG, ""))
    return folder if folder.is_absolute() and folder.is_dir() else None
