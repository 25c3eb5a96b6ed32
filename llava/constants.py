"""Values shared by every part of the system: tokens, ids and serving intervals (spec/model.md, "Constants")."""

from typing import Final

CONTROLLER_HEART_BEAT_EXPIRATION: Final = 30
WORKER_HEART_BEAT_INTERVAL: Final = 15
LOGDIR: Final = "."

IGNORE_INDEX: Final = -100
IMAGE_TOKEN_INDEX: Final = -200
DEFAULT_IMAGE_TOKEN: Final = "<image>"
DEFAULT_IMAGE_PATCH_TOKEN: Final = "<im_patch>"
DEFAULT_IM_START_TOKEN: Final = "<im_start>"
DEFAULT_IM_END_TOKEN: Final = "<im_end>"
