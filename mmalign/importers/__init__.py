"""Importers: a data set in its own format becomes a table of our comparisons, media unread. One function a format.

Every importer takes settings only (path, split ...) and returns Imported: the table, and the rows it left out.
"""

from collections.abc import Callable

from mmalign.importers.comparisons import comparisons
from mmalign.importers.hpdv2 import hpdv2
from mmalign.importers.image_reward_db import image_reward_db
from mmalign.importers.imagefolder import imagefolder
from mmalign.importers.pick_a_pic import pick_a_pic
from mmalign.importers.prompts import prompts
from mmalign.importers.single_images import single_images
from mmalign.importers.tables import Imported

__all__ = [
    "IMPORTERS",
    "Imported",
    "comparisons",
    "hpdv2",
    "image_reward_db",
    "imagefolder",
    "pick_a_pic",
    "prompts",
    "single_images",
]

IMPORTERS: dict[str, Callable[..., Imported]] = {
    "comparisons": comparisons,
    "pick_a_pic": pick_a_pic,
    "hpdv2": hpdv2,
    "image_reward_db": image_reward_db,
    "imagefolder": imagefolder,
    "single_images": single_images,
    "prompts": prompts,
}
