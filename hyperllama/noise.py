"""Libraries print errors and no advice, so that what a user reads comes from us.

Verbs and the quickstart call it first, before they import anything heavy; `import hyperllama` never does.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings

# transformers, huggingface_hub, datasets and tqdm document these variables and read them when they are imported. A user's own
# settings stay: TRANSFORMERS_VERBOSITY=warning brings advice back, and an empty TQDM_DISABLE brings back progress bars.
SETTINGS = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
}


def quiet() -> None:
    """Have libraries print errors only, in this process and those that it starts; PYTHONWARNINGS and -W keep their say."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # DeepSpeed sets the level of its logger, which writes to stdout, when it is imported; a filter stays.
    logging.getLogger("DeepSpeed").addFilter(_is_error)
    if not sys.warnoptions:
        for category in (FutureWarning, UserWarning):
            warnings.simplefilter("ignore", category)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
