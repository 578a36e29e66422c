"""What VBench's own final-score script knows, and which files each dimension reads.

Read from github.com/Vchitect/VBench at commit 45e79ec14e69a2187202c675d2dbce1a71843d53: scripts/constant.py,
scripts/cal_final_score.py and vbench/utils.py.
"""

from __future__ import annotations

from dataclasses import dataclass

COMMIT = "45e79ec14e69a2187202c675d2dbce1a71843d53"


@dataclass(frozen=True)
class Dimension:
    """A dimension's place in the total: its raw score is mapped from [low, high] to [0, 1] and weighs `weight`.

    `weights` are files below VBench's cache folder; `detector` tells that it needs detectron2.
    """

    low: float
    high: float
    quality: bool
    weight: float = 1.0
    weights: tuple[str, ...] = ()
    detector: bool = False


_CLIP_B, _CLIP_L = "clip_model/ViT-B-32.pt", "clip_model/ViT-L-14.pt"
_GRIT = ("grit_model/grit_b_densecap_objectdet.pth",)
_VICLIP = ("ViCLIP/ViClip-InternVid-10M-FLT.pth", "ViCLIP/bpe_simple_vocab_16e6.txt.gz")
_DINO = ("dino_model/dino_vitbase16_pretrain.pth", "dino_model/facebookresearch_dino_main/hubconf.py")
_AESTHETIC = (_CLIP_L, "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth")
_UMT = ("umt_model/l16_ptk710_ftk710_ftk400_f16_res224.pth",)

DIMENSIONS: dict[str, Dimension] = {
    "subject_consistency": Dimension(0.1462, 1.0, quality=True, weights=_DINO),
    "background_consistency": Dimension(0.2615, 1.0, quality=True, weights=(_CLIP_B,)),
    "temporal_flickering": Dimension(0.6293, 1.0, quality=True),
    "motion_smoothness": Dimension(0.706, 0.9975, quality=True, weights=("amt_model/amt-s.pth",)),
    "dynamic_degree": Dimension(0.0, 1.0, quality=True, weight=0.5, weights=("raft_model/models/raft-things.pth",)),
    "aesthetic_quality": Dimension(0.0, 1.0, quality=True, weights=_AESTHETIC),
    "imaging_quality": Dimension(0.0, 1.0, quality=True, weights=("pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",)),
    "object_class": Dimension(0.0, 1.0, quality=False, weights=_GRIT, detector=True),
    "multiple_objects": Dimension(0.0, 1.0, quality=False, weights=_GRIT, detector=True),
    "human_action": Dimension(0.0, 1.0, quality=False, weights=_UMT),
    "color": Dimension(0.0, 1.0, quality=False, weights=_GRIT, detector=True),
    "spatial_relationship": Dimension(0.0, 1.0, quality=False, weights=_GRIT, detector=True),
    "scene": Dimension(0.0, 0.8222, quality=False, weights=("caption_model/tag2text_swin_14m.pth",)),
    "appearance_style": Dimension(0.0009, 0.2855, quality=False, weights=(_CLIP_B,)),
    "temporal_style": Dimension(0.0, 0.364, quality=False, weights=_VICLIP),
    "overall_consistency": Dimension(0.0, 0.364, quality=False, weights=_VICLIP),
}
QUALITY_WEIGHT, SEMANTIC_WEIGHT = 4.0, 1.0
# The static filter reads optical flow; VBench runs it before temporal_flickering alone.
FLICKERING, FILTER_WEIGHTS = "temporal_flickering", "raft_model/models/raft-things.pth"
VIDEOS, FLICKERING_VIDEOS = 5, 25
# Where the publisher's address or name holds the SHA-256, or its beginning; of the others the digest is recorded.
DIGESTS = {
    _CLIP_B: "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    _CLIP_L: "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "pyiqa_model/musiq_spaq_ckpt-358bb6af.pth": "358bb6af",
}
