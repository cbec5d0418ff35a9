"""Documents to batches: datasets, vocabularies, packing, and the embedded novels."""

from tvq_haiku.data.austen_novels import austen
from tvq_haiku.data.packing import PackedBatches, count_windows, windows
from tvq_haiku.data.sentencepiece_vocabulary import PieceVocabulary, train_pieces
from tvq_haiku.data.sources.books import Books
from tvq_haiku.data.sources.imagenet import DownsampledImages
from tvq_haiku.data.sources.text import Enwik8, TextFiles
from tvq_haiku.data.stream import TokenStream, stream_of
from tvq_haiku.data.token_cache import open_split
from tvq_haiku.data.vocabulary import ByteVocabulary
