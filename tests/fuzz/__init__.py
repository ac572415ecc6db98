"""Random programs, on one device and on ranks: outputs, gradients, buffers and written inputs, on every rank.

    make fuzz                                    # 5,000 programs, an hour or more of two cores
    python -m tests.fuzz --programs 100 --seed 7

A program is a list of steps over streams of rows. What a stream is cut into by one step is what the next one meets.
Nothing is asserted of what moves: see `test_programs` for that.
"""
