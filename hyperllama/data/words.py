"""Plain English nouns that serve as arbitrary labels in symbol tuning; none is a label of a common data set."""

_LIST = """
anchor apple apron arch arrow ash attic axle badge bakery balcony ball bamboo banana banjo bark barn barrel basin basket bath
beach beacon bead beam bean bear beard beaver bed bee bell belt bench berry bicycle birch blanket blossom boat bolt bone book
boot bottle bow bowl box bracelet branch brass bread brick bridge broom brush bucket buckle bulb bundle bus bush butter button
cabin cabinet cable cactus cake camel camera candle canoe canvas cape car card carpet carrot cart castle cat cave cedar cellar
chain chair chalk cheese cherry chest chimney chisel church cinnamon clay cliff cloak clock cloud clover coal coast coat cobweb
coconut coffee coin comb comet compass cone copper coral cork corn cottage cotton couch cradle crane crater crayon cream creek
crown crystal cup curtain cushion daisy dam deck deer desk dial diamond dish dock doll dolphin donkey door dough dove drawer
dress drill drum duck dune dust eagle ear easel egg elbow elephant elm engine envelope fabric falcon fan farm feather fence
fern ferry fiddle field fig finger fir flag flame flask flint flood floor flour flower flute fog foil forest fork fossil
fountain fox frame frog frost fruit funnel fur furnace garage garden garlic gate gem ghost ginger giraffe glacier glass globe
glove glue goat gold goose grain grape grass gravel guitar hail hammer hammock hand harbor harp hat hawk hay hazel heart hedge
helmet hen herb hill hinge hive honey hood hook horn horse hose hotel house ice igloo ink inn iron island ivory ivy jacket jar
jelly jewel jug jungle kettle key kite kitten knee knife knot ladder lagoon lake lamb lamp lantern lark lava lawn leaf leather
ledge lemon lens letter lever library lid lily lime linen lion lizard lobster lock log loom lotus magnet mango mantle map maple
marble market marsh mask mast mattress meadow melon metal mill mint mirror mitten moat mole monk moon moose mop moss moth
mountain mouse mud mug mushroom nail napkin neck needle nest net nickel night noodle nose notebook nut oak oar oasis oat ocean
olive onion orange orbit orchard orchid otter oven owl oxen oyster paddle page pail palace palm pan panda panel paper parcel
park parrot pasta path peach peacock pear pearl pebble pen pencil pepper piano pier pig pigeon pillar pillow pine pipe pirate
plank plate plow plum pocket pond pony porch pot potato powder prism pulley pump pumpkin puppet purse quartz queen quill quilt
rabbit radish raft rail rain rake ram ranch raven razor reef ribbon rice ring river road robe rocket roof root rope rose ruby
rug rust saddle sail salad salt sand sandal satin sauce saw scarf school scissors screw seal seed shark shawl shed sheep shelf
shell ship shirt shoe shovel shrimp sickle silk silver sink skate skirt sled slipper snail snake snow soap sock sofa soil soup
spade sparrow spear spider spoon squirrel stable stairs stamp star statue steam steel stem stone stool storm stove straw stream
street string sugar suit sun swan sweater sword syrup table tail tailor tank tea temple tent thistle thorn thread throne thumb
thunder tiger tile timber tin toast tomato tongue torch towel tower toy tractor trail train tray tree trumpet trunk tub tulip
tunnel turkey turtle twig umbrella valley valve vase vault veil velvet vest vine violin volcano wagon wall walnut walrus water
wax well whale wheat wheel whistle willow window wing wire wolf wood wool worm wreath yacht yard yarn zebra zipper
"""
WORDS = tuple(_LIST.split())
