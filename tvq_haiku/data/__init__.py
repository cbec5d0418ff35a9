"""From texts to batches: sources, vocabularies, packing, and the embedded corpus."""

from tvq_haiku.data.books import Books
from tvq_haiku.data.corpus import austen
from tvq_haiku.data.packing import count_windows
from tvq_haiku.data.packing import PackedBatches
from tvq_haiku.data.packing import windows
from tvq_haiku.data.pieces import PieceVocabulary
from tvq_haiku.data.pieces import train_pieces
from tvq_haiku.data.pixels import DownsampledImages
from tvq_haiku.data.stream import stream_of
from tvq_haiku.data.stream import TokenStream
from tvq_haiku.data.text_files import Enwik8
from tvq_haiku.data.text_files import TextFiles
from tvq_haiku.data.token_files import open_split
from tvq_haiku.data.vocabulary import ByteVocabulary
