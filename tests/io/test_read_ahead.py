"""Reading ahead: in order, within bounds, and with errors where they belong."""

import threading

import pytest

from jqlora.io.read_ahead import Job, read_ahead


def test_results_come_in_order_and_the_next_is_read_while_one_is_used():
    reading = [threading.Event() for _ in range(4)]
    used = []

    def job(i):
        def read():
            reading[i].set()
            return i

        def use(value):
            if i < 3:
                assert reading[i + 1].wait(10), "the next tensor waits for this one"
            used.append(value)

        return Job(1 if i else 2, read, use)

    # the first job is the largest and alone, so nothing is read beside it
    jobs = [job(i) for i in range(4)]
    jobs[0] = jobs[0]._replace(use=used.append)
    read_ahead(jobs)
    assert used == [0, 1, 2, 3]


@pytest.mark.parametrize("sizes", [[5, 1, 1, 1, 1, 1, 1], [1, 2, 3, 4, 5], [3, 3, 3], [7], []])
def test_no_more_is_held_than_the_largest_job_needs_alone(sizes):
    lock, held, peak = threading.Lock(), 0, 0

    def job(size):
        def read():
            nonlocal held, peak
            with lock:
                held += size
                peak = max(peak, held)
            return size

        def use(value):
            nonlocal held
            with lock:
                held -= value

        return Job(size, read, use)

    read_ahead([job(size) for size in sizes])
    assert held == 0
    assert peak <= max(sizes, default=0)


@pytest.mark.parametrize("part", ["read", "use"])
def test_an_error_is_raised_in_its_turn_and_ends_the_thread(part):
    used, begun = [], []

    def job(i):
        def read():
            begun.append(i)
            if part == "read" and i == 2:
                raise ValueError("tensor 2 is damaged")
            return i

        def use(value):
            if part == "use" and i == 2:
                raise ValueError("tensor 2 is damaged")
            used.append(value)

        return Job(1, read, use)

    with pytest.raises(ValueError, match="tensor 2 is damaged"):
        read_ahead([job(i) for i in range(9)])
    assert used == [0, 1]
    assert begun[-1] < 8
    assert not any(thread.name.startswith("read-ahead") for thread in threading.enumerate())
