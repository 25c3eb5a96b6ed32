"""Token strings, special ids and serving intervals, with their published names and values."""

from typing import Final

CONTROLLER_HEART_BEAT_EXPIRATION: Final = 30  # seconds without a heartbeat after which a worker is removed
WORKER_HEART_BEAT_INTERVAL: Final = 15  # seconds
LOGDIR: Final = "."  # directory of log files, unless the environment variable LOGDIR is set

IGNORE_INDEX: Final = -100  # label of tokens without a loss
IMAGE_TOKEN_INDEX: Final = -200  # id of an image placeholder in `input_ids`
DEFAULT_IMAGE_TOKEN: Final = "<image>"
DEFAULT_IMAGE_PATCH_TOKEN: Final = "<im_patch>"
DEFAULT_IM_START_TOKEN: Final = "<im_start>"
DEFAULT_IM_END_TOKEN: Final = "<im_end>"
