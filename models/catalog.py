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
import models.pickscore
import models.shapes_clip
import models.shapes_oracle  # noqa: F401
