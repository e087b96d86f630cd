"""Where the training examples come from. SOURCES maps a name to the settings of a source."""

from mmalign.sources.offline import Offline, OfflineStream
from mmalign.sources.online_pairs import OnlinePairs
from mmalign.sources.order import Draw, Mix, Order
from mmalign.sources.prepared import Prepared, Shape, Source, Stream
from mmalign.sources.replay import Replay
from mmalign.sources.rollouts import Rollouts
from mmalign.sources.self_play import SelfPlay

__all__ = [
    "SOURCES",
    "Draw",
    "Mix",
    "Offline",
    "OfflineStream",
    "OnlinePairs",
    "Order",
    "Prepared",
    "Replay",
    "Rollouts",
    "SelfPlay",
    "Shape",
    "Source",
    "Stream",
]

SOURCES: dict[str, type[Source]] = {
    "offline": Offline,
    "online_pairs": OnlinePairs,
    "replay": Replay,
    "rollouts": Rollouts,
    "self_play": SelfPlay,
}
