"""Methods of every sort."""


class Plant:
    def __init__(self, name="plant"):
        self.name = name

    def grow(self, by=1):
        return ["Plant.grow", self.name, by]

    @classmethod
    def seed(cls, count):
        return ["Plant.seed", cls.__name__, count]

    @staticmethod
    def price(count):
        return ["Plant.price", count]

    async def water(self, litres):
        return ["Plant.water", self.name, litres]

    def fruits(self, count):
        yield from range(count)

    @property
    def age(self):
        return 1


class Tree(Plant):
    height: int
    shade: bool = True

    class Leaf:
        def turn(self, colour):
            return ["Leaf.turn", colour]

    def __private(self):
        return "private"

    def __call__(self, by=1):
        return ["Tree.__call__", by]

    climb = __call__


class Bush(Plant):
    def grow(self, by=1):
        return ["Bush", *super().grow(by)]


class Graft(Tree, Bush):
    """Tree inherits grow; through this class the next one in line is Bush's."""


class Bare:
    pass


plant_seed = Plant.seed
plant_grow = Plant.grow
