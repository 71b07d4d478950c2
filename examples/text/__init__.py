"""Classification of texts by a small BERT, in float and in int8."""
