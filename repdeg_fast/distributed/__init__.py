"""More than one device: vocabularies cut over ranks (:class:`VocabularyShard`, :class:`VocabularyParallel`), and a
debug mode that finds what ranks disagree on. docs/distributed.md is the guide."""

from repdeg_fast.distributed.debug import compare_arguments
from repdeg_fast.distributed.shards import VocabularyShard
from repdeg_fast.distributed.style import VocabularyParallel

__all__ = ["VocabularyParallel", "VocabularyShard", "compare_arguments"]
