"""Imports every reward model once, so that it registers itself: one line a model."""

import models.aesthetic
import models.bench_clip
import models.clip_score
import models.geneval
import models.hpsv2
import models.hpsv3
import models.imagereward
import models.jpeg
import models.ocr
import models.one_reward
import models.pickscore
import models.reward_dance
import models.shapes_clip
import models.shapes_judge
import models.shapes_oracle
import models.unified_reward
import models.unified_reward_flex
import models.unified_reward_think  # noqa: F401
