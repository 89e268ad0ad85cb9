"""The loss of one model on a token file or a text: evaluate.py scores every token, estimate.py random windows.

train.py's own estimate, and the best_val_loss that a run recorded, are of the second kind.
"""
