"""``python -m benchmarks.parity FOLDER [--full]`` (make parity): reference cases through rewards and trainer alike.

It lives here because here both may be imported: models import no trainer, and the trainer no models.
"""
