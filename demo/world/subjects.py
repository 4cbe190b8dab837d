"""What is drawn: the word of each subject, and its name in the emoji sets where that is another.

One word (or two) per subject; kept is what a picture of 128 pixels can show and what differs from all others.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

from .sets import BASE_SETS

_ANIMALS = """
ant bat bear beaver bird boar bee=honeybee butterfly camel cat chick=front-facing-baby-chick chipmunk cow crab
crocodile deer dinosaur=sauropod dog dolphin dove dragon duck eagle elephant fish flamingo fox frog giraffe goat
gorilla hamster hatchling=hatching-chick hedgehog hippo=hippopotamus horse jellyfish kangaroo koala
ladybug=lady-beetle leopard lion lizard llama lobster monkey moose mouse octopus otter owl ox panda parrot peacock
penguin pig poodle pufferfish=blowfish rabbit raccoon rhino=rhinoceros rooster scorpion seal shark sheep=ewe shrimp
skunk sloth snail snake spider squid swan tiger turkey turtle tyrannosaur=t-rex unicorn whale=spouting-whale wolf
zebra
"""
_PLANTS = """
blossom bouquet cactus clover=four-leaf-clover fern=herb hibiscus leaf=fallen-leaf maple=maple-leaf mushroom
palm=palm-tree pine=evergreen-tree potted-plant rose seedling shell=spiral-shell sunflower tree=deciduous-tree tulip
coral web=spider-web
"""
_FOOD = """
amphora apple=red-apple avocado bacon baguette=baguette-bread banana beer=beer-mug bento=bento-box blueberries
bottle=bottle-with-popping-cork bread broccoli bubble-tea burrito cake=birthday-cake candy carrot cheese=cheese-wedge
cherries chestnut chocolate=chocolate-bar cocktail=cocktail-glass coconut cookie corn=ear-of-corn coffee=hot-beverage
croissant cucumber cupcake custard dango doughnut dumpling egg=cooking eggplant fries=french-fries garlic grapes
hamburger honey=honey-pot hot-dog ice-cream kiwi=kiwi-fruit lemon lettuce=leafy-green lollipop mango meat=meat-on-bone
melon onion orange=tangerine pancakes peach peanuts pear peas=pea-pod pepper=hot-pepper pie pineapple pizza popcorn
potato poultry=poultry-leg pretzel rice-ball salad=green-salad sandwich shaved-ice shortcake soft-ice=soft-ice-cream
soup=pot-of-food spaghetti steak=cut-of-meat strawberry sushi taco teapot tomato waffle watermelon wine=wine-glass
"""
_THINGS = """
accordion alembic anchor axe backpack balloon baseball basket basketball bathtub battery bed bell bomb books
boot=womans-boot bow=bow-and-arrow boxing-glove briefcase broom bucket camera candle cap=billed-cap chair
christmas-tree clapper=clapper-board compass computer=desktop-computer couch=couch-and-lamp crayon crown crystal-ball
cup=trophy dice=game-die doll=nesting-dolls door dress drum envelope extinguisher=fire-extinguisher
fan=folding-hand-fan flashlight football=american-football gear gem=gem-stone ghost gift=wrapped-gift guitar hammer
handbag hat=top-hat headphones=headphone heel=high-heeled-shoe helmet=rescue-workers-helmet hourglass=hourglass-done
ice-skate jeans joystick key kimono kite knife=kitchen-knife ladder lantern=red-paper-lantern laptop lamp=light-bulb
lipstick lock=locked magnet mailbox=open-mailbox-with-raised-flag maracas medal=sports-medal megaphone microphone
microscope moai newspaper notebook package palette=artist-palette paintbrush parachute pencil phone=telephone
piano=musical-keyboard pick pill postbox printer pumpkin=jack-o-lantern purse puzzle=puzzle-piece racket=tennis radio
ribbon ring roller-skate satellite-dish=satellite-antenna saw=carpentry-saw saxophone scale=balance-scale scissors
scroll shield shirt=t-shirt shopping-cart skateboard skis snowman soccer-ball=soccer-ball spoon stethoscope
suitcase=luggage sunglasses syringe teddy-bear telescope television thermometer toilet toolbox trumpet umbrella violin
volleyball watch wrench yarn
"""
_VEHICLES = """
airplane ambulance bicycle boat=sailboat bus canoe car=automobile fire-engine helicopter kick-scooter locomotive
motorcycle pickup=pickup-truck police-car racing-car rickshaw=auto-rickshaw rocket satellite scooter=motor-scooter
ship speedboat saucer=flying-saucer taxi tractor train tram truck=delivery-truck
"""
_PLACES = """
bank castle church circus=circus-tent cloud comet factory ferris-wheel fire fountain fuel-pump hospital house hut
island=desert-island japanese-castle moon=crescent-moon mosque mountain planet=ringed-planet rainbow school
shrine=shinto-shrine snowflake star sun temple=hindu-temple tent tokyo-tower tornado
traffic-light=vertical-traffic-light volcano wave=water-wave carousel=carousel-horse stadium lightning=high-voltage
droplet globe=globe-showing-europe-africa
"""
GROUPS = {
    "animals": _ANIMALS,
    "plants": _PLANTS,
    "food": _FOOD,
    "things": _THINGS,
    "vehicles": _VEHICLES,
    "places": _PLACES,
}


def _read() -> dict[str, str]:
    found = {}
    for group in GROUPS.values():
        for entry in group.split():
            word, _, icon = entry.partition("=")
            found[word.replace("-", " ")] = icon or word
    return found


ICONS: dict[str, str] = _read()  # "polar bear" -> "polar-bear"

# Drawings that show something else (the country's flag, a face), or a framed scene instead of the thing.
LEFT_OUT = {
    ("turkey", "streamline"),
    ("sunglasses", "firefox"),
    *((subject, "streamline") for subject in "ship rainbow castle factory fire fountain tent carousel".split()),
    ("ferris wheel", "streamline"),
}

# One drawing of a subject each, to be taught by a LoRA: the base knows the subject in its other drawings alone.
DESIGNS: dict[str, str] = {
    "octopus": "noto",
    "house": "blob",
    "mushroom": "twemoji",
    "rocket": "emojione",
    "penguin": "noto",
    "turtle": "noto",
    "castle": "twemoji",
    "guitar": "emojione",
    "elephant": "blob",
    "teapot": "twemoji",
}
HELD_OUT_PAIRS = 24


def held_out(keys: Iterable[tuple[str, str]]) -> set[tuple[str, str]]:
    """(subject, set) pairs among `keys` that no training of the base sees: the designs, and others drawn by lot.

    Drawn are drawings of subjects that the base knows from at least six other sets.
    """
    sets_of: dict[str, list[str]] = {}
    for subject, word in keys:
        if word in BASE_SETS:
            sets_of.setdefault(subject, []).append(word)
    rng = random.Random("held out")
    known = sorted(subject for subject, words in sets_of.items() if len(words) >= 7 and subject not in DESIGNS)
    chosen = rng.sample(known, min(HELD_OUT_PAIRS, len(known)))
    return set(DESIGNS.items()) | {(subject, rng.choice(sorted(sets_of[subject]))) for subject in chosen}
