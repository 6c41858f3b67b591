"""Pure tensor mathematics: no modules, paths, devices, logging or progress in here.

Shape suffixes used throughout:
    O  output channels (rows of W)        R  rank
    I  input channels (columns of W)      K  kept input columns
    T  tokens                             P  kept output rows
"""
