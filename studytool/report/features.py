"""The winner's features before and after its training: how well they keep the classes apart, and a map of them in 2D.

Volumes of the validation split are used, so that the test split is read once only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from studytool.data.shards import Dataset
from studytool.models.adapt import StagedModel
from studytool.models.build import build_model
from studytool.models.embedding import embed
from studytool.seeds import derive_seed
from studytool.training.device import choose_device, choose_memory_format, release_memory
from studytool.training.inputs import Feed
from studytool.training.meter import CostMeter
from studytool.training.trained import load_trained

MOST_VOLUMES = 400
"""More dots would hide one another, and embedding them takes time on a CPU."""
NEIGHBOURS = 5
_MOST_COMPONENTS = 50


@dataclass(frozen=True)
class FeatureMap:
    """Features of N volumes: their `places` in 2D [N, 2] and how well they keep the classes apart.

    `silhouette` is the mean silhouette of the true classes (-1 to 1), `neighbour_accuracy` how often the majority of
    the nearest five others has the right class, `rand_index` the adjusted Rand index of k-means clusters against the
    classes (0: as by chance, 1: the same).
    """

    places: NDArray[np.float64]
    silhouette: float
    neighbour_accuracy: float
    rand_index: float


@dataclass(frozen=True)
class FeatureMaps:
    """The same volumes, with labels int64 [N], as the network saw them before and after its training."""

    labels: NDArray[np.int64]
    before: FeatureMap
    after: FeatureMap


def feature_maps(trial_folder: Path, dataset: Dataset, *, most: int = MOST_VOLUMES, seed: int = 0) -> FeatureMaps:
    """Embed at most `most` volumes of the validation split, equally many of each class, by a trial's network.

    Raises:
        WeightsError: the trial's weights are damaged or missing, or those that it started from are not here any more.
        DataError: volumes cannot be read.
    """
    trained = load_trained(trial_folder)
    trial = trained.trial
    rows = balanced_draw(dataset.labels, dataset.rows("val"), most, seed)
    untrained = build_model(
        trial.model,
        num_classes=len(trained.classes),
        volume_shape_dhw=trained.record.volume_shape_dhw,
        seed=trial.seed,
    )
    device = choose_device(None)
    labels = dataset.labels[rows]
    maps = []
    for model in (untrained, trained.model):
        memory_format = choose_memory_format(trial.train.channels_last, model, device)
        feed = Feed(
            dataset,
            rows,
            trial.input,
            batch_size=trial.train.batch_size,
            training=False,
            seed=trial.seed,
            device=device,
            memory_format=memory_format,
            meter=CostMeter(device),
        )
        maps.append(describe_features(_features(model.to(device).to(memory_format=memory_format), feed), labels, seed))
        model.cpu()
    release_memory(device)
    return FeatureMaps(labels, *maps)


def describe_features(features: NDArray[np.float64], labels: NDArray[np.int64], seed: int = 0) -> FeatureMap:
    """The map (t-SNE, van der Maaten and Hinton, JMLR 9 (2008) 2579) and the scores of features [N, F].

    Features are standardized; those that are the same for all volumes are left out.

    Raises:
        ValueError: fewer than eight volumes or than two classes.
    """
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from sklearn.metrics import adjusted_rand_score, silhouette_score
    from sklearn.model_selection import LeaveOneOut, cross_val_predict
    from sklearn.neighbors import KNeighborsClassifier

    count, classes = len(labels), np.unique(labels)
    if count < 8 or len(classes) < 2:
        raise ValueError(f"{count} volumes of {len(classes)} classes are too few for a map")
    spread = features.std(axis=0)
    varied = features[:, spread > 1e-9 * max(1.0, float(spread.max()))]
    if not varied.size:
        return FeatureMap(np.zeros((count, 2)), 0.0, 1.0 / len(classes), 0.0)
    standard = (varied - varied.mean(axis=0)) / varied.std(axis=0)
    components = min(_MOST_COMPONENTS, *standard.shape)
    reduced = PCA(components, random_state=seed).fit_transform(standard)
    places = TSNE(2, perplexity=min(30.0, (count - 1) / 3), init="pca", random_state=seed).fit_transform(
        reduced if components > 1 else np.hstack([reduced, np.zeros_like(reduced)])
    )
    neighbours = KNeighborsClassifier(min(NEIGHBOURS, count - 1))
    clusters = KMeans(len(classes), n_init=10, random_state=seed).fit_predict(standard)
    silhouette = float(silhouette_score(standard, labels)) if len(classes) < count else 0.0
    return FeatureMap(
        places.astype(np.float64),
        silhouette,
        float((cross_val_predict(neighbours, standard, labels, cv=LeaveOneOut()) == labels).mean()),
        float(adjusted_rand_score(labels, clusters)),
    )


def balanced_draw(labels: NDArray[np.int64], rows: NDArray[np.int64], most: int, seed: int) -> NDArray[np.int64]:
    """At most `most` of `rows`, rising, with as many of each class as there are, up to an equal share."""
    share = max(1, most // max(1, len(np.unique(labels[rows]))))
    rng = np.random.default_rng(derive_seed(seed, "features"))
    drawn = [rng.permutation(rows[labels[rows] == label])[:share] for label in np.unique(labels[rows])]
    return np.sort(np.concatenate(drawn))


def _features(model: StagedModel, feed: Feed) -> NDArray[np.float64]:
    parts = [embed(model, volumes_B1DHW).double().cpu() for volumes_B1DHW, _ in feed.epoch(0)]
    return torch.cat(parts).numpy()
