"""What a user reads is ours: libraries keep their advice to themselves, and still show their errors.

Called at the start of a verb, before anything heavy is imported, and by what else a user starts; never by `import hyperllama`.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings

# Documented by transformers, huggingface_hub, datasets and tqdm, which read them when they are imported. What a user has set
# stays: TRANSFORMERS_VERBOSITY=warning brings the advice back, an empty TQDM_DISABLE the bars.
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
