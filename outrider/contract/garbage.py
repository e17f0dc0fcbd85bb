"""Python's search for reference cycles, in processes that hold many objects and have others waiting for them."""

import gc


def search_less_often() -> None:
    """Have cycles looked for less often, and not in what is there from now on.

    Thousands of rollouts in flight are hundreds of thousands of objects, and lists of millions of tokens. With the
    usual thresholds they are walked through again and again: a third of the CPU time at 10,000 in flight, and with 256
    long ones a pause of 30 to 80 ms each second, in which no client of a server got a token.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
