"""x402, version 2: payments on the spot (https://github.com/coinbase/x402, specs).

A payment becomes credits, and credits pay the call: there is no second place where credits move.

    wire.py         the three headers, and what a facilitator says
    evm.py, svm.py  what a payer has signed, on Ethereum's networks and on Solana's
    payment.py      a payment, and what must be right about it
    records.py      the claim on a payment, and how it ended
    facilitator.py  settling, by somebody who pays the network's fees
    chain.py        what really happened, read from the network
    desk.py         all of it for one process: quote, read, settle, deposit
    reconciler.py   what became of payments nobody heard the end of
"""
