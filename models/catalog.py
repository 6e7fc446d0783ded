"""Imports every reward model once, so that it registers itself: one line a model."""

import models.bench_clip
import models.jpeg
import models.ocr
import models.shapes_clip
import models.shapes_oracle  # noqa: F401
