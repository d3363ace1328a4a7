"""Stage pt: pretraining. The loss is sft's; its data are documents (pipeline/encoding.py), in which every
token is a label, packed into full rows unless packing=false."""

from stages.sft import TokenLoss


class DocumentLoss(TokenLoss):
    pass
