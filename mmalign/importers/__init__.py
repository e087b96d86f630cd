"""Importers: a data set in its own format becomes a table of our comparisons, media unread. One function a format.

Every importer takes settings only (path, split ...) and returns Imported: the table, and the rows it left out.
"""

from collections.abc import Callable

from mmalign.importers.argilla import argilla
from mmalign.importers.beavertails_v import beavertails_v
from mmalign.importers.comparisons import comparisons
from mmalign.importers.helpsteer import helpsteer2, helpsteer2_preference
from mmalign.importers.hh_rlhf import hh_rlhf, nectar
from mmalign.importers.hpdv2 import hpdv2
from mmalign.importers.image_pairs import rlaif_v, spa_vl
from mmalign.importers.image_reward_db import image_reward_db
from mmalign.importers.imagefolder import imagefolder
from mmalign.importers.llama_factory import llama_factory
from mmalign.importers.llava_hound import llava_hound
from mmalign.importers.mmsafe_po import mmsafe_po
from mmalign.importers.ms_swift import ms_swift
from mmalign.importers.oasst import oasst
from mmalign.importers.pick_a_pic import pick_a_pic
from mmalign.importers.pku_safe_rlhf import pku_safe_rlhf
from mmalign.importers.prompts import prompts
from mmalign.importers.shp import shp
from mmalign.importers.single_images import single_images
from mmalign.importers.step_dpo import dove, step_dpo
from mmalign.importers.tables import Imported
from mmalign.importers.trl import trl
from mmalign.importers.trl_format import extract_prompt, to_trl, unpair
from mmalign.importers.ultrafeedback import ultrafeedback
from mmalign.importers.vlfeedback import vlfeedback

__all__ = [
    "IMPORTERS",
    "Imported",
    "argilla",
    "beavertails_v",
    "comparisons",
    "dove",
    "extract_prompt",
    "helpsteer2",
    "helpsteer2_preference",
    "hh_rlhf",
    "hpdv2",
    "image_reward_db",
    "imagefolder",
    "llama_factory",
    "llava_hound",
    "mmsafe_po",
    "ms_swift",
    "nectar",
    "oasst",
    "pick_a_pic",
    "pku_safe_rlhf",
    "prompts",
    "rlaif_v",
    "shp",
    "single_images",
    "spa_vl",
    "step_dpo",
    "to_trl",
    "trl",
    "ultrafeedback",
    "unpair",
    "vlfeedback",
]

IMPORTERS: dict[str, Callable[..., Imported]] = {
    "comparisons": comparisons,
    "pick_a_pic": pick_a_pic,
    "hpdv2": hpdv2,
    "image_reward_db": image_reward_db,
    "imagefolder": imagefolder,
    "single_images": single_images,
    "prompts": prompts,
    "trl": trl,
    "ultrafeedback": ultrafeedback,
    "helpsteer2": helpsteer2,
    "helpsteer2_preference": helpsteer2_preference,
    "hh_rlhf": hh_rlhf,
    "nectar": nectar,
    "oasst": oasst,
    "shp": shp,
    "pku_safe_rlhf": pku_safe_rlhf,
    "step_dpo": step_dpo,
    "dove": dove,
    "argilla": argilla,
    "llama_factory": llama_factory,
    "ms_swift": ms_swift,
    "mmsafe_po": mmsafe_po,
    "spa_vl": spa_vl,
    "rlaif_v": rlaif_v,
    "vlfeedback": vlfeedback,
    "beavertails_v": beavertails_v,
    "llava_hound": llava_hound,
}
