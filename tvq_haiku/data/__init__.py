"""From texts to batches: vocabularies, packing, and the embedded corpus."""

from tvq_haiku.data.corpus import austen
from tvq_haiku.data.packing import count_windows
from tvq_haiku.data.packing import PackedBatches
from tvq_haiku.data.packing import stream_of
from tvq_haiku.data.packing import TokenStream
from tvq_haiku.data.packing import windows
from tvq_haiku.data.vocabulary import ByteVocabulary
