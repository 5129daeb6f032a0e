"""What requests are made of that a model is asked to answer when it writes its own texts: topics, people, functions,
sums and sentences. Each part fits each other part beside it, so that few parts make many requests."""

from __future__ import annotations


def _parts(text: str) -> tuple[str, ...]:
    """What stands between the semicolons of ``text``, whose lines end anywhere."""
    return tuple(part.strip() for part in " ".join(text.split()).split(";"))


TOPICS = _parts(
    """
    the water cycle; how vaccines work; the history of bread; black holes; volcanoes; the Roman road network; tides;
    honeybees; the invention of the printing press; electric cars; how rainbows form; the human heart; chess; coral
    reefs; the Silk Road; solar panels; sleep; the moon landing; glaciers; coffee; the French Revolution;
    photosynthesis; whales; the Great Wall of China; inflation; the stock market; recycling; bicycles; the Amazon
    rainforest; earthquakes; penguins; the violin; jazz; the Renaissance; machine learning; computer viruses; public
    libraries; school uniforms; urban gardens; marathon running; yoga; the Olympic Games; football; the telephone; how
    aeroplanes fly; bridges; the Suez Canal; deserts; hurricanes; the ozone layer; antibiotics; the immune system;
    diabetes; healthy breakfasts; olive oil; cheese making; tea; chocolate; the potato; rice farming; the horse in
    history; wolves; elephants; octopuses; dinosaurs; fossils; the planet Mars; comets; the speed of light; gravity;
    magnets; batteries; semiconductors; the internet; passwords; online privacy; social media; newspapers;
    photography; the cinema; puppet theatre; opera; poetry; fairy tales; detective novels; comics; museums; the
    pyramids of Egypt; ancient Greece; the Vikings; the Ottoman Empire; the Industrial Revolution; railways; steam
    engines; lighthouses; submarines; the compass; maps; time zones; calendars; the number zero; prime numbers; maths
    at school; statistics; surveys; voting; constitutions; the United Nations; borders; passports; tourism; hotels;
    camping; mountain rescue; skiing; swimming; first aid; hospitals; nurses; teachers; apprenticeships; job
    interviews; remote work; meetings; emails; customer service; small businesses; taxes; pensions; insurance; renting
    a flat; moving house; DIY repairs; plumbing; wood as a building material; concrete; steel; glass; plastic; paper;
    ink; fountain pens; handwriting; learning a language; dictionaries; proverbs; jokes; music lessons; the piano;
    choirs; dance; fashion; shoes; umbrellas; weather forecasts; clouds; snow; forests; rivers; wetlands; fishing;
    bird watching; cats; dogs; veterinary medicine; farm animals; soil; compost; wind power; nuclear power; hydrogen;
    heat pumps; insulation; city buses; trams; parking; traffic lights; road safety; self-driving cars; drones; robots
    in factories; 3D printing; video games; board games
    """
)
PEOPLE = _parts(
    """
    a ship's captain; a museum guide; a strict but fair teacher; a detective in Victorian London; a farmer; a village
    doctor; an astronaut on a space station; a medieval blacksmith; a travel agent; a sports reporter; a head chef; a
    librarian; a retired judge; a robot that learns to feel; a mountain guide; a grandmother; a lawyer who explains
    things simply; a fitness coach; a wizard's apprentice; a lighthouse keeper; a job interviewer; a shop assistant; a
    novelist; a bus driver; a scientist in Antarctica
    """
)
NAMES = _parts(
    """
    Anna; Ben; Carla; David; Emma; Farid; Grace; Hiro; Ines; Jonas; Kofi; Lena; Mark; Nadia; Omar; Paula; Quinn; Rosa;
    Sam; Tara; Uma; Victor; Wanda; Yusuf
    """
)
PLACES = _parts(
    """
    Lisbon; Oslo; Kyoto; Nairobi; Montreal; Prague; Lima; Dublin; Hanoi; Vienna; Cairo; Seattle; Bergen; Porto;
    Tallinn; Marseille; Chennai; Wellington; Bologna; Krakow
    """
)
THINGS = _parts(
    """
    apples; books; tickets; marbles; stamps; pencils; eggs; chairs; bottles; flowers; cookies; tiles; photos; boxes of
    tea; candles; coins; shirts; loaves of bread
    """
)

# a signature and what it does, as a docstring says it
FUNCTIONS = (
    ("count_vowels(text: str) -> int", "Count the vowels in text, in either case."),
    ("is_palindrome(text: str) -> bool", "Tell whether text reads the same backwards, ignoring spaces and case."),
    ("flatten(items: list) -> list", "Make one flat list of lists that may hold lists."),
    ("second_largest(numbers: list[int]) -> int | None", "The second largest distinct number, None if there is none."),
    ("word_counts(text: str) -> dict[str, int]", "How often each word occurs in text."),
    ("merge_sorted(a: list[int], b: list[int]) -> list[int]", "Merge two sorted lists into a sorted one."),
    ("gcd(a: int, b: int) -> int", "The greatest common divisor of two positive integers."),
    ("fibonacci(n: int) -> list[int]", "The first n Fibonacci numbers."),
    ("is_prime(n: int) -> bool", "Whether n is a prime number."),
    ("prime_factors(n: int) -> list[int]", "The prime factors of n in ascending order."),
    ("rotate(items: list, k: int) -> list", "The list rotated to the right by k places."),
    ("remove_duplicates(items: list) -> list", "The items without repetitions, in the order in which they came."),
    ("binary_search(items: list[int], x: int) -> int", "The index of x in a sorted list, or -1 if it is not there."),
    ("transpose(matrix: list[list[float]]) -> list[list[float]]", "Swap the rows and columns of a matrix."),
    ("multiply(a: list[list[float]], b: list[list[float]]) -> list[list[float]]", "The product of two matrices."),
    ("to_roman(n: int) -> str", "Write a number between 1 and 3999 in Roman numerals."),
    ("from_binary(digits: str) -> int", "The number that a string of binary digits stands for."),
    ("to_binary(n: int) -> str", "The binary digits of a number that is not negative."),
    ("caesar(text: str, shift: int) -> str", "Shift every letter by so many places, and leave other characters."),
    ("is_anagram(a: str, b: str) -> bool", "Whether two words have the same letters."),
    ("longest_word(text: str) -> str", "The longest word of a sentence, the first one if there are several."),
    ("average(numbers: list[float]) -> float", "The mean of the numbers; 0.0 if there are none."),
    ("median(numbers: list[float]) -> float", "The middle number, or the mean of the two in the middle."),
    ("mode(numbers: list[int]) -> int", "The number that occurs most often, the smallest of several."),
    ("running_sum(numbers: list[int]) -> list[int]", "The sums of the first one, two, three and more numbers."),
    ("chunks(items: list, size: int) -> list[list]", "Split a list into parts of so many items, or fewer at the end."),
    ("digits_sum(n: int) -> int", "The sum of the decimal digits of n."),
    ("factorial(n: int) -> int", "The product of the numbers from 1 to n."),
    ("power(base: float, exponent: int) -> float", "The base to an exponent that may be negative, without **."),
    ("common_items(a: list, b: list) -> list", "What is in both lists, sorted and without repetitions."),
    ("reverse_words(text: str) -> str", "The words of a sentence in reverse order."),
    ("capitalize_words(text: str) -> str", "Begin every word with a capital letter."),
    ("valid_brackets(text: str) -> bool", "Whether every bracket of text is closed in the right order."),
    ("compress(text: str) -> str", "Write runs of a letter as the letter and its count, as in a3b1."),
    ("expand(text: str) -> str", "Undo run-length encoding such as a3b1."),
    ("leap_year(year: int) -> bool", "Whether a year has 366 days."),
    ("days_between(first: str, last: str) -> int", "The days between two dates such as 2024-05-31."),
    ("celsius(fahrenheit: float) -> float", "Turn degrees Fahrenheit into degrees Celsius, with one decimal."),
    ("bubble_sort(numbers: list[int]) -> list[int]", "Sort the numbers by swapping neighbours."),
    ("quick_sort(numbers: list[int]) -> list[int]", "Sort the numbers by splitting them around a pivot."),
    ("max_subarray(numbers: list[int]) -> int", "The largest sum of neighbouring numbers."),
    ("two_sum(numbers: list[int], target: int) -> tuple[int, int] | None", "Indices of two numbers with this sum."),
    ("longest_prefix(words: list[str]) -> str", "The longest beginning that all words share."),
    ("is_sorted(items: list[int]) -> bool", "Whether no item is smaller than the one before it."),
    ("even_numbers(numbers: list[int]) -> list[int]", "The even numbers, in their order."),
    ("squares(n: int) -> dict[int, int]", "The numbers from 1 to n with their squares."),
    ("invert(mapping: dict) -> dict", "A dictionary with keys and values exchanged."),
    ("group_by_length(words: list[str]) -> dict[int, list[str]]", "The words by how many letters they have."),
    ("parse_query(query: str) -> dict[str, str]", "The names and values of a query string such as a=1&b=2."),
    ("read_csv(path: str) -> list[dict[str, str]]", "The rows of a CSV file, by the names in its first line."),
    ("count_lines(path: str) -> int", "How many lines of a text file aren't empty."),
    ("valid_email(address: str) -> bool", "Whether an address has one @ and a dot behind it."),
    ("hamming(a: str, b: str) -> int", "At how many places two strings of one length differ."),
    ("edit_distance(a: str, b: str) -> int", "The fewest insertions, deletions and changes from a to b."),
    ("pascal(n: int) -> list[list[int]]", "The first n rows of Pascal's triangle."),
    ("collatz(n: int) -> list[int]", "The Collatz sequence from n down to 1."),
    ("perfect(n: int) -> bool", "Whether n is the sum of its proper divisors."),
    ("triangle_area(a: float, b: float, c: float) -> float", "The area by the three sides; -1 if it is no triangle."),
    ("distance(p: tuple[float, float], q: tuple[float, float]) -> float", "The distance between two points."),
    ("spiral(matrix: list[list[int]]) -> list[int]", "The numbers of a matrix in the order of a spiral."),
    ("snake_case(name: str) -> str", "Turn a name such as userName into user_name."),
    ("truncate(text: str, width: int) -> str", "Cut text to a width, with three dots where something is missing."),
    ("top_k(counts: dict[str, int], k: int) -> list[str]", "The k keys with the largest counts, ties by name."),
    ("moving_average(numbers: list[float], size: int) -> list[float]", "The means of a window that moves along."),
    ("luhn(number: str) -> bool", "Whether a card number passes the Luhn check."),
    ("zip_longest(a: list, b: list) -> list[tuple]", "Pairs of two lists, with None where one has ended."),
)  # fmt: skip
# calls of some of them, and what these give
EXAMPLES = {
    "count_vowels": (('"Hello World"', "3"),),
    "is_palindrome": (('"Never odd or even"', "True"), ('"tree"', "False")),
    "flatten": (("[1, [2, [3, 4]], 5]", "[1, 2, 3, 4, 5]"),),
    "second_largest": (("[3, 8, 8, 5]", "5"), ("[1]", "None")),
    "merge_sorted": (("[1, 4], [2, 3, 9]", "[1, 2, 3, 4, 9]"),),
    "gcd": (("12, 18", "6"), ("7, 5", "1")),
    "fibonacci": (("6", "[0, 1, 1, 2, 3, 5]"),),
    "is_prime": (("7", "True"), ("9", "False")),
    "prime_factors": (("60", "[2, 2, 3, 5]"),),
    "rotate": (("[1, 2, 3, 4], 1", "[4, 1, 2, 3]"),),
    "remove_duplicates": (("[2, 1, 2, 3, 1]", "[2, 1, 3]"),),
    "binary_search": (("[1, 3, 5, 7], 5", "2"), ("[1, 3], 4", "-1")),
    "transpose": (("[[1, 2], [3, 4]]", "[[1, 3], [2, 4]]"),),
    "to_roman": (("14", "'XIV'"),),
    "from_binary": (('"101"', "5"),),
    "caesar": (('"abc", 2', "'cde'"),),
    "is_anagram": (('"listen", "silent"', "True"),),
    "average": (("[1.0, 2.0, 6.0]", "3.0"), ("[]", "0.0")),
    "running_sum": (("[1, 2, 3, 4]", "[1, 3, 6, 10]"),),
    "chunks": (("[1, 2, 3, 4, 5], 2", "[[1, 2], [3, 4], [5]]"),),
    "digits_sum": (("472", "13"),),
    "factorial": (("5", "120"),),
    "common_items": (("[3, 1, 2], [2, 3, 5]", "[2, 3]"),),
    "reverse_words": (('"one two three"', "'three two one'"),),
    "valid_brackets": (('"(a[b])"', "True"), ('"(]"', "False")),
    "compress": (('"aaab"', "'a3b1'"),),
    "leap_year": (("2024", "True"), ("1900", "False")),
    "max_subarray": (("[1, -2, 3, 4, -1]", "7"),),
    "two_sum": (("[2, 7, 11, 15], 9", "(0, 1)"),),
    "longest_prefix": (('["flow", "flower", "flight"]', "'fl'"),),
    "even_numbers": (("[1, 2, 3, 4]", "[2, 4]"),),
    "squares": (("3", "{1: 1, 2: 4, 3: 9}"),),
    "hamming": (('"karolin", "kathrin"', "3"),),
    "edit_distance": (('"kitten", "sitting"', "3"),),
    "collatz": (("6", "[6, 3, 10, 5, 16, 8, 4, 2, 1]"),),
    "spiral": (("[[1, 2], [4, 3]]", "[1, 2, 3, 4]"),),
    "snake_case": (('"userName"', "'user_name'"),),
    "top_k": (('{"a": 3, "b": 5, "c": 3}, 2', "['b', 'a']"),),
}
PROGRAMS = _parts(
    """
    reads a list of numbers from standard input and prints their sum; downloads a web page and counts its links;
    renames all files of a folder by the date of their last change; keeps a to-do list in a text file; plays noughts
    and crosses against the user; draws a bar chart of sales by month; checks which words are misspelt; makes a random
    password of a given length; turns a Markdown file into HTML; is a small calculator with brackets; sends a reminder
    by email each morning; sorts a large file that doesn't fit into memory; is a queue made of two stacks; is a linked
    list with methods to insert, delete and print; is a class for a bank account with deposits and withdrawals; finds
    the shortest path in a maze; simulates a traffic light; counts the words of a text by frequency; implements a
    binary search tree; caches the results of a slow function; validates a form with name and age; converts
    temperatures between three scales; shows the current time in five cities; merges several CSV files
    """
)
LANGUAGES = ("Python", "Python", "Python", "JavaScript", "Java", "C", "C++", "Go", "SQL", "Bash")

# word problems; a, b and c are numbers
SUMS = (
    "{name} has {a} {thing} and buys {b} more. Then {name} gives {c} of them to a friend. How many {thing} are left?",
    "A box holds {a} {thing}. {name} fills {b} boxes and has {c} {thing} left over. How many {thing} are there in all?",
    "{name} drives at {a} km an hour for {c} hours, then at {b} km an hour for 2 hours. How far is that?",
    "A shop sells {thing} at ${c} each. {name} sells {a} in the morning and {b} in the afternoon. How much is that?",
    "{name} saves ${a} a week. After {c} weeks {name} spends ${b}. How much is left?",
    "There are {a} children in a school. {b} of them walk, and half of the rest come by bus. How many is that?",
    "{name} reads {c} pages a day. The book has {a} pages and {name} has read {b}. How many days does the rest take?",
    "A garden is {a} metres long and {b} metres wide. How long is a fence around it, and what is its area?",
    "{name} bakes {a} {thing} in {c} hours. How many does {name} bake in {b} hours at that pace?",
    "A coat costs ${a}. It is reduced by {c}0 percent. {name} pays with ${b}. How much is still missing?",
    "{name} is {c} years older than {other}. Together they are {a} years old. How old are they?",
    "A tank holds {a} litres. A pump fills {c} litres a minute while {b} litres are in it already. When is it full?",
    "{name} and {other} share {a} {thing} in the ratio 2 to {c}. How many does each of them get?",
    "Three friends pay ${a}, ${b} and ${c} for a meal. How much must each pay the others so that all pay the same?",
    "What is {a} times {b}, plus {c}? Work it out step by step.",
    "Solve for x: {c}x + {a} = {b}. Show your work.",
    "The first number is {a}. Each further one is {c} more than the one before it. What is the {b}th number?",
    "{name} works {c} days a week, {a} minutes a day, and is paid ${b} an hour. How much is that in 4 weeks?",
)  # fmt: skip
PUZZLES = (
    "{name} is taller than {other}. {third} is shorter than {other}. Who is the tallest, and who is the shortest?",
    "All {thing} in the room are red. {name} holds something that is not red. Can it be one of the {thing}? Explain.",
    "{name} arrived before {other}, but after {third}. Who came second?",
    "If it rains, {name} stays at home. {name} is not at home. What do you know about the weather?",
    "Which word does not belong: {thing}, {second}, {place}, {more}? Say why.",
    "{name} faces north, turns right twice and left once. Which way does {name} face now?",
    "A clock is {a} minutes slow each day. It was set on Monday at noon. What does it show on Thursday at noon?",
    "{name} says that {other} lies. {other} says that {third} lies. {third} says that both lie. Who tells the truth?",
    "Is it better to learn about {topic} or about {next}? Weigh the reasons, and decide.",
    "What would happen if there were no such thing as {topic}? Think step by step.",
    "What causes people to care about {topic}? Name three causes and one effect of each.",
)  # fmt: skip

# sentences: subjects, what they did, and clauses behind it
SENTENCES = {
    "English": (
        _parts(
            """
            The mayor of the town; Our new neighbour; A young researcher; The company; My younger sister; The museum;
            A group of students; The old fisherman; The national team; The government
            """
        ),
        _parts(
            """
            opened a small library last week; wrote a long letter to the editor; found an old map in the cellar; has
            sold more than two thousand tickets; explained the new rules to the visitors; planted forty trees along
            the river; missed the last train to the coast; announced a plan for cheaper housing; repaired the bridge
            before winter; won the prize for the second time
            """
        ),
        _parts(
            """
            although it had rained all day; because many people had asked for it; while the others were still asleep;
            and nobody noticed it at first; which surprised even the experts; so that the work could begin in spring
            """
        ),
    ),
    "German": (
        _parts(
            """
            Der Bürgermeister; Unsere neue Nachbarin; Ein junger Forscher; Das Unternehmen; Meine jüngere Schwester;
            Das Museum; Eine Gruppe von Studenten; Der alte Fischer; Die Nationalmannschaft; Die Bundesregierung
            """
        ),
        _parts(
            """
            eröffnete letzte Woche eine kleine Bibliothek; schrieb einen langen Brief an die Zeitung; fand im Keller
            eine alte Landkarte; hat mehr als zweitausend Karten verkauft; erklärte den Besuchern die neuen Regeln;
            pflanzte vierzig Bäume am Fluss; verpasste den letzten Zug zur Küste; kündigte einen Plan für billigere
            Wohnungen an; reparierte die Brücke noch vor dem Winter; gewann den Preis zum zweiten Mal
            """
        ),
        _parts(
            """
            obwohl es den ganzen Tag geregnet hatte; weil viele Menschen darum gebeten hatten; während die anderen
            noch schliefen; und zuerst bemerkte es niemand; was selbst die Fachleute überraschte; damit die Arbeit im
            Frühjahr beginnen konnte
            """
        ),
    ),
    "French": (
        _parts(
            """
            Le maire de la ville; Notre nouvelle voisine; Un jeune chercheur; L'entreprise; Ma petite sœur; Le musée;
            Un groupe d'étudiants; Le vieux pêcheur; L'équipe nationale; Le gouvernement
            """
        ),
        _parts(
            """
            a ouvert une petite bibliothèque la semaine dernière; a écrit une longue lettre au journal; a trouvé une
            vieille carte dans la cave; a vendu plus de deux mille billets; a expliqué les nouvelles règles aux
            visiteurs; a planté quarante arbres au bord de la rivière; a manqué le dernier train pour la côte; a
            annoncé un plan pour des logements moins chers; a réparé le pont avant l'hiver; a gagné le prix pour la
            deuxième fois
            """
        ),
        _parts(
            """
            bien qu'il ait plu toute la journée; parce que beaucoup de gens l'avaient demandé; pendant que les autres
            dormaient encore; et personne ne l'a remarqué au début; ce qui a surpris même les experts; afin que les
            travaux commencent au printemps
            """
        ),
    ),
    "Spanish": (
        _parts(
            """
            El alcalde de la ciudad; Nuestra nueva vecina; Un joven investigador; La empresa; Mi hermana menor; El
            museo; Un grupo de estudiantes; El viejo pescador; La selección nacional; El gobierno
            """
        ),
        _parts(
            """
            abrió una pequeña biblioteca la semana pasada; escribió una larga carta al periódico; encontró un mapa
            antiguo en el sótano; ha vendido más de dos mil entradas; explicó las nuevas reglas a los visitantes;
            plantó cuarenta árboles junto al río; perdió el último tren a la costa; anunció un plan para viviendas más
            baratas; reparó el puente antes del invierno; ganó el premio por segunda vez
            """
        ),
        _parts(
            """
            aunque había llovido todo el día; porque mucha gente lo había pedido; mientras los demás todavía dormían;
            y al principio nadie se dio cuenta; lo que sorprendió incluso a los expertos; para que el trabajo empezara
            en primavera
            """
        ),
    ),
    "Italian": (
        _parts(
            """
            Il sindaco della città; La nostra nuova vicina; Un giovane ricercatore; L'azienda; La mia sorella minore;
            Il museo; Un gruppo di studenti; Il vecchio pescatore; La squadra nazionale; Il governo
            """
        ),
        _parts(
            """
            ha aperto una piccola biblioteca la settimana scorsa; ha scritto una lunga lettera al giornale; ha trovato
            una vecchia mappa in cantina; ha venduto più di duemila biglietti; ha spiegato le nuove regole ai
            visitatori; ha piantato quaranta alberi lungo il fiume; ha perso l'ultimo treno per la costa; ha
            annunciato un piano per case meno care; ha riparato il ponte prima dell'inverno; ha vinto il premio per la
            seconda volta
            """
        ),
        _parts(
            """
            anche se aveva piovuto tutto il giorno; perché molte persone lo avevano chiesto; mentre gli altri
            dormivano ancora; e all'inizio nessuno se ne è accorto; il che ha sorpreso anche gli esperti; così i
            lavori possono iniziare in primavera
            """
        ),
    ),
    "Dutch": (
        _parts(
            """
            De burgemeester; Onze nieuwe buurvrouw; Een jonge onderzoeker; Het bedrijf; Mijn jongere zus; Het museum;
            Een groep studenten; De oude visser; Het nationale elftal; De regering
            """
        ),
        _parts(
            """
            opende vorige week een kleine bibliotheek; schreef een lange brief aan de krant; vond een oude kaart in de
            kelder; heeft meer dan tweeduizend kaartjes verkocht; legde de bezoekers de nieuwe regels uit; plantte
            veertig bomen langs de rivier; miste de laatste trein naar de kust; kondigde een plan voor goedkopere
            woningen aan; herstelde de brug voor de winter; won de prijs voor de tweede keer
            """
        ),
        _parts(
            """
            hoewel het de hele dag had geregend; omdat veel mensen erom hadden gevraagd; terwijl de anderen nog
            sliepen; en eerst merkte niemand het; wat zelfs de deskundigen verraste; zodat het werk in het voorjaar
            kon beginnen
            """
        ),
    ),
}
