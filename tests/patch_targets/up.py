"""The upstream of the random histories."""


def f():
    return ["f"]


class Base:
    def m(self):
        return ["m"]

    @classmethod
    def c(cls):
        return ["c", cls.__name__]

    @staticmethod
    def s():
        return ["s"]


class Sub(Base):
    pass
