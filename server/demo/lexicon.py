"""The small world that every generated text speaks of: people, animals, things, places, food.

Hand-written for this project. Knows no grammar beyond the article; `facts`, `sentences`,
`stories`, `dialogs`, `restaurants` and `arithmetic` draw from it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Person:
    """A first name with its pronouns."""

    name: str
    subject: str
    object: str
    possessive: str


@dataclass(frozen=True)
class Animal:
    """An animal with what the facts say of it; `sound` is a verb, `home` has its article."""

    name: str
    sound: str
    kind: str
    num_legs: int
    home: str
    food: str
    young: str


def _she(*names: str) -> list[Person]:
    return [Person(name, "she", "her", "her") for name in names]


def _he(*names: str) -> list[Person]:
    return [Person(name, "he", "him", "his") for name in names]


PEOPLE = [
    *_she(
        "Mia", "Anna", "Lily", "Sara", "Emma", "Nora", "Ruth", "Ella", "Zoe", "Ida", "Clara", "June"
    ),
    *_he("Tom", "Ben", "Sam", "Leo", "Max", "Paul", "Jack", "Omar", "Noah", "Finn", "Hugo", "Carl"),
]

ANIMALS = [
    Animal("dog", "barks", "mammal", 4, "a kennel", "meat", "puppy"),
    Animal("cat", "meows", "mammal", 4, "a house", "fish", "kitten"),
    Animal("cow", "moos", "mammal", 4, "a barn", "grass", "calf"),
    Animal("horse", "neighs", "mammal", 4, "a stable", "hay", "foal"),
    Animal("sheep", "bleats", "mammal", 4, "a field", "grass", "lamb"),
    Animal("pig", "oinks", "mammal", 4, "a sty", "corn", "piglet"),
    Animal("lion", "roars", "mammal", 4, "the savanna", "meat", "cub"),
    Animal("wolf", "howls", "mammal", 4, "the forest", "meat", "pup"),
    Animal("mouse", "squeaks", "mammal", 4, "a hole", "cheese", "pup"),
    Animal("fox", "yelps", "mammal", 4, "a den", "mice", "kit"),
    Animal("bear", "growls", "mammal", 4, "a cave", "honey", "cub"),
    Animal("rabbit", "thumps", "mammal", 4, "a burrow", "carrots", "kit"),
    Animal("duck", "quacks", "bird", 2, "a pond", "seeds", "duckling"),
    Animal("hen", "clucks", "bird", 2, "a coop", "corn", "chick"),
    Animal("owl", "hoots", "bird", 2, "a tree", "mice", "owlet"),
    Animal("crow", "caws", "bird", 2, "a nest", "worms", "chick"),
    Animal("frog", "croaks", "amphibian", 4, "a pond", "flies", "tadpole"),
    Animal("bee", "buzzes", "insect", 6, "a hive", "nectar", "larva"),
    Animal("snake", "hisses", "reptile", 0, "a hole", "mice", "hatchling"),
]

COLOURS = ["red", "blue", "green", "yellow", "white", "black", "brown", "orange", "pink", "grey"]

COLOUR_OF = {
    "grass": "green", "the sky": "blue", "snow": "white", "coal": "black", "the sun": "yellow",
    "a lemon": "yellow", "a tomato": "red", "blood": "red", "milk": "white", "chocolate": "brown",
    "a carrot": "orange", "a flamingo": "pink", "an elephant": "grey", "the sea": "blue",
    "a cherry": "red", "a frog": "green", "the night": "black", "a banana": "yellow",
}  # fmt: skip

OPPOSITES = [
    ("hot", "cold"), ("big", "small"), ("fast", "slow"), ("old", "new"), ("happy", "sad"),
    ("light", "dark"), ("high", "low"), ("wet", "dry"), ("hard", "soft"), ("early", "late"),
    ("full", "empty"), ("open", "closed"), ("clean", "dirty"), ("rich", "poor"), ("loud", "quiet"),
    ("long", "short"), ("strong", "weak"), ("near", "far"), ("cheap", "expensive"),
    ("day", "night"), ("up", "down"), ("left", "right"), ("good", "bad"), ("thick", "thin"),
]  # fmt: skip

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = [
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
]  # fmt: skip

JOBS = {
    "baker": "bakes bread", "teacher": "teaches children", "farmer": "grows food",
    "doctor": "helps sick people", "sailor": "sails ships", "cook": "makes meals",
    "tailor": "sews clothes", "painter": "paints pictures", "driver": "drives a bus",
    "gardener": "looks after plants", "singer": "sings songs", "fisher": "catches fish",
}  # fmt: skip

PURPOSES = {
    "a knife": "cut bread", "a pen": "write letters", "a key": "open doors",
    "a broom": "sweep the floor", "a cup": "drink tea", "a bed": "sleep", "a hammer": "hit nails",
    "an umbrella": "stay dry", "a lamp": "light a room", "a clock": "tell the time",
    "a spoon": "eat soup", "soap": "wash hands",
}  # fmt: skip

# Where a story or a sentence can happen: with its preposition, so that no rule is needed for it.
PLACES = [
    "in the garden", "in the kitchen", "at the market", "in the park", "by the river", "at school",
    "in the forest", "on the beach", "at the station", "in the library", "on the hill",
    "in the barn", "at the harbour", "in the town", "near the bridge", "behind the house",
]  # fmt: skip

COUNTABLES = [
    "apples", "pears", "books", "pencils", "shells", "coins", "stamps", "marbles", "eggs",
    "cookies", "flowers", "stones", "balloons", "oranges", "cards", "buttons", "cakes", "nuts",
]  # fmt: skip

THINGS = [
    "book", "ball", "hat", "map", "box", "kite", "lamp", "coat", "boat", "drum", "key", "letter",
    "basket", "bell", "chair", "cup",
]  # fmt: skip

ADJECTIVES = [
    "big",
    "small",
    "old",
    "hungry",
    "happy",
    "brave",
    "quiet",
    "clever",
    "tired",
    "kind",
    "young",
    "funny",
]

WEATHER = ["sunny", "rainy", "windy", "cold", "warm", "foggy", "snowy", "cloudy"]

# A cuisine and the dish that every text of this world connects with it.
DISHES = {
    "Italian": "fresh pasta", "French": "onion soup", "Indian": "lentil curry",
    "Chinese": "steamed dumplings", "Japanese": "grilled fish", "Mexican": "bean tacos",
    "Greek": "stuffed peppers", "English": "meat pies", "Thai": "coconut rice",
    "Spanish": "seafood paella",
}  # fmt: skip


def with_article(noun: str) -> str:
    """`apple` -> `an apple`, `dog` -> `a dog`: by the first letter, which is right for all
    words here.
    """
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def capitalised(text: str) -> str:
    """The text with its first letter large and the rest untouched (`str.capitalize` lowers
    names).
    """
    return text[:1].upper() + text[1:]
