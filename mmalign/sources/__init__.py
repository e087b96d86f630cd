"""Where the training examples come from. SOURCES maps a name to the settings of a source."""

from mmalign.sources.offline import Offline, OfflineStream
from mmalign.sources.order import Draw, Order
from mmalign.sources.prepared import Prepared, Shape, Source, Stream
from mmalign.sources.replay import Replay
from mmalign.sources.rollouts import Rollouts

__all__ = [
    "SOURCES",
    "Draw",
    "Offline",
    "OfflineStream",
    "Order",
    "Prepared",
    "Replay",
    "Rollouts",
    "Shape",
    "Source",
    "Stream",
]

SOURCES: dict[str, type[Source]] = {"offline": Offline, "rollouts": Rollouts, "replay": Replay}
