"""Functions and values of every sort."""

import functools

LIMIT = 3
REGISTRY = {"saw": 1}
HAVE_LADDER = True


def without_name(function):
    def inner(*args, **kwargs):
        return function(*args, **kwargs)

    return inner


def with_name(function):
    @functools.wraps(function)
    def inner(*args, **kwargs):
        return function(*args, **kwargs)

    return inner


def cut(length, *, angle=0):
    """Cut a branch."""
    return ["cut", length, angle]


def saw(length):
    return cut(length)


trim = cut


@without_name
def decorated(length):
    return ["decorated", length]


@with_name
def documented(length: int = 1) -> list:
    return ["documented", length]


async def pick(count):
    return ["pick", count]


def rows(count):
    total = 0
    for number in range(count):
        total += (yield number) or 0
    return total


async def pages(count):
    try:
        for number in range(count):
            try:
                sent = yield number
            except KeyError:
                sent = "caught"
            if sent:
                yield sent
    finally:
        closed.append("pages")


closed = []
