"""Training data: reading its usual forms, holding out a part, and converting it into tokens.

Nothing is dropped silently. An invalid row is an error that names the file and the line. Cut or dropped parts are
counted and reported.
"""

from .chat import Tokenised, chat_dataset, preference_dataset
from .examples import Columns, Completion, Conversation, Document, Preference, Split, check_held_out
from .files import COMPRESSIONS, FILE_TYPES
from .forms import FORMS
from .load import Loaded, load_data, load_documents, load_judged
from .packing import Packed, PackedCollator, check_packing, packed, padded_collator
from .sources import PYTHON_TOPICS, python_topics
from .split import split_documents
from .texts import LabelledTexts, TokenBlocks, label_numbers

__all__ = [
    "COMPRESSIONS",
    "FILE_TYPES",
    "FORMS",
    "PYTHON_TOPICS",
    "Columns",
    "Completion",
    "Conversation",
    "Document",
    "LabelledTexts",
    "Loaded",
    "Packed",
    "PackedCollator",
    "Preference",
    "Split",
    "TokenBlocks",
    "Tokenised",
    "chat_dataset",
    "check_held_out",
    "check_packing",
    "label_numbers",
    "load_data",
    "load_documents",
    "load_judged",
    "packed",
    "padded_collator",
    "preference_dataset",
    "python_topics",
    "split_documents",
]
