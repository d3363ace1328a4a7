"""Rows of any data set -> examples -> batches without padding. data.py puts the parts together.

The way of a row: (place, dict) of a reader -> Conversation or document -> Example -> TokenArrays, kept on
disk -> ExampleStore -> Batch. Example: tokens (n,) int32, trained (n,) bool, turns (n,) int16, roles (n,)
uint8, source (data set, row); one segment, or the two of a pair. Batch: one flat row of T tokens in N
segments, see batch.py.

sources.py    dataset_info.json, files, folders, hubs -> DatasetInfo and its rows
readers.py    .json .jsonl .csv .parquet .arrow .txt -> rows with their places
formats.py    a row -> Conversation (messages, tools), pair, rated answer or document; KINDS by stage
encoding.py   those -> Example: rendered, tokenised, cut, marked; in one process or several
cutting.py    which tokens of an over-long example stay
tokenise.py   a whole data set out of the cache, or tokenised now and kept there
store.py      TokenArrays and ExampleStore; the cache's files, written to survive a kill
streaming.py  rows read while training, nothing stored, and the loader of them
mixing.py     which rows in which order: choosing, interleaving, holding out; pure functions of a seed
packing.py    whole examples into rows of a given length
batch.py      Batch, the loaders and their order over ranks
prefetch.py   the next batches in a thread
report.py     what became of the rows; an example as text
preview.py    a batch token by token: python data.py preview CONFIG

To add a file type: a reader in readers.py, a line in _READERS. To add a format of rows: a function in
formats.py.
"""
