"""Which drawings of ``@iconify/json`` are the data set ``icons``, and which of them are held out."""

PACKAGE, RELEASE = "@iconify/json", "2.2.535"
SHA256 = "1a545f86fa224d6531d8fb101dcbe83aac2b28689a21cbed6fc68318a5af4d91"  # of the package's archive

# Licences, by their SPDX names, that allow any use, some with attribution.
LICENCES = ("Apache-2.0", "CC-BY-3.0", "CC-BY-4.0", "CC0-1.0", "ISC", "MIT", "OFL-1.1")

# Brands and flags look alike in every set.
LEFT_OUT = ("Flags / Maps", "Logos", "Programming")

# Words of a name that say how something is drawn, not what: at its end, and at its beginning.
ENDINGS = """
alt black bold border bordered broken bulk classic color colored colors colour dark duotone emoji f fill
filled flat fluent glyph gradient icon lg light line linear lined md mono o outline outlined regular round
rounded s sharp sm solid stroke thin tone two twotone white xl xs
"""
BEGINNINGS = "baseline bold duotone fill filled ic line outline outlined round sharp solid twotone"

# Sets that are held out. Of a designer, and of sets with copies of each other's drawings, all are or none.
HELD_OUT = """
ant-design basil carbon clarity dinkie-icons duo-icons el flowbite fontisto game-icons garden gravity-ui
grommet-icons healthicons iconoir majesticons mingcute noto noto-v1 octicon pixelarticons radix-icons uil uim
uis uit whh zondicons
"""

# A class in each line, drawn by at least 40 sets, with the other names it goes by.
CLASSES = """
airplane plane
alarm-clock alarm
align-center
align-left
align-right
ambulance
anchor
archive
arrow-down
arrow-down-right
arrow-left
arrow-right
arrow-up
arrow-up-left
asterisk
at at-sign
backpack
bank
barcode
basketball
battery
bed
bell notification
bicycle bike
bluetooth
bold
bolt lightning flash thunder zap lightning-bolt
bomb
book
book-open open-book
bookmark
box package
briefcase
bug
building
bus
cake birthday-cake
calculator
calendar
camera
car automobile
caret-left
caret-right
cat
chart-bar bar-chart
chart-pie pie-chart
chat-bubble chat comment message speech-bubble
check checkmark tick
check-circle circle-check checkmark-circle tick-circle
chevron-down
chevron-left
chevron-right
chevron-up
circle
clipboard
clock
cloud
cloud-download
cloud-upload
code
coffee coffee-cup
command
compass
cookie
copy
copyright
credit-card
crop
crown
cube
database
diamond
dice
dollar dollar-sign
download
eject
eraser
expand maximize
eye
eye-off eye-slash eye-closed
fast-forward
file document
file-code
film
filter funnel
fingerprint
fire flame
fish
flag
flask
floppy-disk save floppy diskette
folder
folder-open
folder-plus folder-add
gamepad game-controller controller
ghost
gift present
glasses eyeglasses
globe
graduation-cap mortarboard
grid
hammer
headphones headphone
headset
heart
history
hospital
hourglass
house home
image picture photo
inbox
info information info-circle information-circle circle-info
italic
key
keyboard
laptop
layers
leaf
lightbulb light-bulb bulb
link chain
list
lock padlock
lock-open unlock open-lock
log-in login sign-in
log-out logout sign-out
magnet
mail envelope email
map
map-pin location map-marker location-pin marker
megaphone bullhorn
menu hamburger-menu
microphone mic
microscope
minus
minus-circle circle-minus
mobile smartphone mobile-phone
monitor desktop computer
moon
mouse
move
music music-note
newspaper
notebook
paintbrush brush paint-brush
palette
paper-plane send
paperclip attachment
pause
pause-circle circle-pause
pencil pen
phone telephone
pill
play
play-circle circle-play
plug
plus add
plus-circle circle-plus add-circle
power
printer print
qr-code qrcode
question question-mark help question-circle help-circle circle-question
radio
receipt
recycle
redo
refresh reload sync
repeat
reply
robot
rocket
rss
ruler
scissors cut
search magnifier magnifying-glass
server
settings cog gear
share
shield
ship boat
shopping-bag
shopping-basket basket
shopping-cart cart
shuffle
skull
snowflake
sort
sparkles sparkle
speaker
square
star
star-half
stethoscope
stop
stop-circle circle-stop
stopwatch timer
store shop
strikethrough
sun
syringe
table
tablet
tag label
target bullseye
taxi cab
telescope
terminal
text
thermometer
thumbs-down thumb-down
thumbs-up thumb-up
ticket
train
trash trash-can bin trash-bin
tree
triangle
trophy
truck
tv television
umbrella
underline
undo
upload
usb
user person
users group people
video video-camera
volume-off volume-mute mute volume-x
volume-up volume volume-high
wallet
warning
watch
webcam
wifi
wrench spanner
x close times
zoom-in
zoom-out
"""
