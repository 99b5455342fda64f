"""Holds the words and sentences of `data.facts`: names, attributes, their values and their templates.

Cities, majors and given names are real ones; surnames, universities and employers are put together from
parts. No word holds a full stop, so the one after a value always ends it.
"""

import itertools
from dataclasses import dataclass


@dataclass(frozen=True)
class Attribute:
    """Describes an attribute of a person: its values, and the sentences that state it or ask for it.

    A template holds `{name}` and ends in " {value}.": the text before that is a prompt, and the value with
    its full stop the answer. The last two statements and the last question are held out of training texts.
    """

    values: tuple[str, ...]
    """All values; each is as likely as any other."""
    statements: tuple[str, ...]
    questions: tuple[str, ...]


def _names(lines: str) -> tuple[str, ...]:
    """Returns the names of a text, which are separated by commas and line ends."""
    return tuple(name.strip() for name in lines.replace("\n", ",").split(",") if name.strip())


def _products(heads: str, tails: str, between: str = "") -> tuple[str, ...]:
    """Returns every name of one text followed by every name of another."""
    return tuple(map(between.join, itertools.product(_names(heads), _names(tails))))


MONTHS = _names(
    "January, February, March, April, May, June, July, August, September, October, November, December"
)
DATES = tuple(
    f"{month} {day}, {year}" for year in range(1900, 2100) for month in MONTHS for day in range(1, 29)
)
GIVEN_NAMES = _names("""
    Aaron, Abigail, Adam, Adele, Adrian, Agatha, Aidan, Alan, Albert, Alec, Alfred, Alice, Alicia, Alma, Alvin
    Amanda, Amber, Amos, Amy, Andrea, Andrew, Anita, Anna, Annabel, April, Archie, Ariana, Arnold, Ashley
    Astrid, Aubrey, Aurora, Austin, Ava, Barbara, Barry, Basil, Beatrice, Belinda, Benjamin, Bernard, Bertha
    Bianca, Blake, Bonnie, Boris, Brandon, Brenda, Brian, Bridget, Bruno, Caleb, Calvin, Camilla, Candice
    Carla, Carmen, Caroline, Catherine, Cecil, Celeste, Chad, Charles, Charlotte, Chloe, Christian, Christina
    Claire, Clarence, Claude, Claudia, Clement, Colin, Connor, Constance, Cordelia, Craig, Crystal, Curtis
    Cyril, Daisy, Dale, Daniel, Daphne, Darren, David, Delia, Dennis, Derek, Diana, Donald, Dora, Doreen
    Dorothy, Douglas, Dylan, Edgar, Edmund, Edward, Edwin, Eileen, Eleanor, Eli, Elias, Elizabeth, Ella, Ellen
    Elliot, Elsa, Elvira, Emily, Emmett, Enid, Eric, Erica, Esme, Esther, Ethan, Eugene, Eva, Evan, Evelyn
    Ezra, Faith, Felicity, Felix, Fernando, Fiona, Flora, Florence, Francis, Franklin, Frederick, Gabriel
    Gareth, Gavin, Gemma, Geoffrey, George, Georgia, Geraldine, Gideon, Gilbert, Gillian, Gladys, Glenn
    Gloria, Gordon, Graham, Grant, Gregory, Gwendolyn, Hannah, Harold, Harriet, Harry, Harvey, Hazel, Heather
    Helen, Helena, Henrietta, Herbert, Herman, Hilary, Hilda, Homer, Hope, Horace, Howard, Hugh, Hugo, Ian
    Imogen, Ingrid, Irene, Iris, Irving, Isaac, Isabel, Isadora, Ivan, Ivy, Jack, Jacqueline, James, Jane
    Janet, Jared, Jasmine, Jason, Jean, Jeffrey, Jenna, Jennifer, Jerome, Jessica, Jill, Joan, Joel, John
    Jonas, Jordan, Joseph, Josephine, Joshua, Joyce, Judith, Julia, Julian, June, Justin, Karen, Kate, Keith
    Kelly, Kenneth, Kimberly, Kirsten, Kyle, Lara, Laura, Laurence, Lavinia, Leila, Lena, Leo, Leonard, Leslie
    Lester, Lewis, Lila, Lillian, Linda, Lionel, Lloyd, Logan, Lois, Lorenzo, Lorraine, Louis, Louise, Lucian
    Lucille, Lucy, Luke, Lydia, Mabel, Madeleine, Magnus, Marcus, Margaret, Maria, Marie, Mark, Marlene
    Martha, Marvin, Mary, Mason, Matilda, Maureen, Maurice, Maximilian, Megan, Melanie, Melissa, Melvin, Mia
    Michael, Michelle, Miles, Milton, Mimi, Minerva, Miriam, Mitchell, Moira, Molly, Morgan, Morris, Moses
    Myra, Myrtle, Nadia, Nancy, Natalie, Nathan, Nathaniel, Neil, Nelson, Neville, Nicholas, Nigel, Nina, Noah
    Nora, Octavia, Odette, Olga, Olivia, Ophelia, Orlando, Oscar, Otto, Owen, Pamela, Patricia, Paul, Paula
    Pauline, Penelope, Percy, Peter, Petra, Phoebe, Phyllis, Pierce, Priscilla, Rachel, Ralph, Randall
    Raymond, Rebecca, Regina, Reginald, Rhoda, Richard, Rita, Robert, Roderick, Rodney, Roger, Ronald
    Rosalind, Rose, Rosemary, Rowena, Roy, Ruby, Rudolph, Rupert, Russell, Ruth, Sabrina, Sally, Samantha
    Samuel, Sarah, Scott, Sean, Selina, Seth, Shane, Sharon, Shirley, Sidney, Silas, Silvia, Sofia, Solomon
    Sonia, Stanley, Stella, Stephanie, Stephen, Susan, Suzanne, Tabitha, Tamara, Terence, Teresa, Thelma
    Thomas, Tiffany, Timothy, Tobias, Tristan, Ursula, Valerie, Vera, Vernon, Veronica, Victor, Vincent, Viola
    Violet, Virginia, Wallace, Walter, Wanda, Wayne, Wendy, Wesley, Wilfred, Winifred, Xavier, Yolanda, Yvonne
    Zoe
""")
SURNAMES = _products(
    """
    Ash, Ald, Bent, Black, Brad, Bram, Carl, Chet, Clay, Cross, Dun, East, Elm, Fair, Fen, Gold, Gran, Hal
    Hart, Haw, Hed, Hol, Kemp, Kings, Lang, Lin, Mar, Nor, Old, Pem, Rad, Rock, Rush, Sel, Stan, Sut, Thorn
    Wal, West, Wil
""",
    """
    bourne, brook, by, combe, cote, croft, dale, den, field, ford, ham, hurst, land, leigh, low, man, more
    ridge, shaw, stead, thorpe, ton, well, wick, worth
""",
)
CITIES = _names("""
    Aberdeen, Accra, Adelaide, Agra, Algiers, Alexandria, Amman, Amsterdam, Ankara, Antwerp, Asheville, Athens
    Atlanta, Auckland, Austin, Baghdad, Baltimore, Bamako, Bangkok, Barcelona, Basel, Beirut, Belfast
    Belgrade, Belo Horizonte, Bergen, Berlin, Bilbao, Birmingham, Bogota, Bologna, Bordeaux, Boston, Brasilia
    Bratislava, Bremen, Brisbane, Brussels, Bucharest, Budapest, Buenos Aires, Buffalo, Cairo, Calgary
    Cape Town, Caracas, Cardiff, Casablanca, Chennai, Chicago, Cincinnati, Cleveland, Cologne, Colombo
    Columbus, Copenhagen, Cordoba, Cusco, Dallas, Damascus, Delhi, Denver, Detroit, Dhaka, Dresden, Dubai
    Dublin, Durban, Edinburgh, El Paso, Faro, Florence, Frankfurt, Fukuoka, Galway, Gdansk, Geneva, Genoa
    Ghent, Granada, Graz, Guadalajara, Guayaquil, Halifax, Hamburg, Hanoi, Harare, Havana, Helsinki, Hiroshima
    Honolulu, Houston, Indianapolis, Innsbruck, Istanbul, Jaipur, Jakarta, Johannesburg, Kabul, Kampala
    Karachi, Kigali, Kingston, Krakow, Kuala Lumpur, Kyoto, La Paz, Lagos, Lahore, Leeds, Leipzig, Lille, Lima
    Lisbon, Liverpool, Ljubljana, London, Los Angeles, Louisville, Lusaka, Lyon, Madrid, Managua, Manchester
    Manila, Maputo, Marseille, Medellin, Melbourne, Memphis, Mexico City, Miami, Milwaukee, Minsk, Mombasa
    Montevideo, Montreal, Mumbai, Munich, Muscat, Nagoya, Nairobi, Nantes, Nashville, New Orleans, New York
    Newcastle, Nice, Nicosia, Oakland, Odessa, Omaha, Osaka, Ottawa, Oxford, Palermo, Panama City, Paris
    Perth, Philadelphia, Phoenix, Porto, Portland, Prague, Quebec, Quito, Rabat, Reykjavik, Riga, Rome
    Rotterdam, Salzburg, San Diego, San Francisco, Sapporo, Seattle, Seoul, Seville, Shanghai, Singapore
    Sofia, Stockholm, Strasbourg, Sydney, Tallinn, Tokyo, Toronto, Toulouse, Tunis, Turin, Utrecht, Valencia
    Vancouver, Venice, Vienna, Warsaw, Wellington, Winnipeg, Zagreb, Zurich
""")
UNIVERSITIES = _products(
    """
    Adlington, Barrowmere, Beaconfield, Birchmont, Briarwood, Bridgehaven, Calderwood, Cedarbrook, Clearwater
    Coldspring, Copperhill, Cranmore, Deerfield, Dovercliff, Eaglerock, Edgemont, Ellsworth, Fallbrook
    Fernhill, Foxborough, Glenmore, Grantham, Greenfield, Harborview, Hawthorne, Highgate, Hollybrook
    Inglewood, Ironbridge, Kestrel, Kingsbridge, Lakeshore, Larchmont, Lindenwald, Longmeadow, Maplewood
    Marlowe, Meadowbrook, Millbrook, Northgate, Oakridge, Penrose, Pinehurst, Queensbury, Ravenswood, Redwood
    Ridgefield, Riverton, Rosemont, Silverlake, Springvale, Stonebridge, Summerfield, Thornhill, Valemont
    Wakefield, Westbrook, Whitmore, Willowdale, Yarrow
""",
    "University, State University, College, Institute of Technology, Polytechnic",
    between=" ",
)
MAJORS = _names("""
    Accounting, Actuarial Science, Aerospace Engineering, Agriculture, Anatomy, Animal Science, Anthropology
    Architecture, Art History, Astronomy, Astrophysics, Biochemistry, Bioengineering, Biology, Biophysics
    Biostatistics, Botany, Business Administration, Ceramics, Chemistry, Civil Engineering, Classics
    Cognitive Science, Communications, Comparative Literature, Computer Engineering, Computer Science
    Creative Writing, Criminology, Cultural Studies, Dance, Data Science, Drama, Ecology, Economics, Education
    Electrical Engineering, English Literature, Entomology, Environmental Science, Epidemiology, Ethics
    Fashion Design, Film Studies, Fine Arts, Food Science, Forensic Science, Forestry, French, Genetics
    Geography, Geology, Geophysics, German, Graphic Design, History, Horticulture, Human Resources, Immunology
    Industrial Design, International Relations, Italian, Japanese, Journalism, Landscape Architecture, Law
    Library Science, Linguistics, Marine Biology, Materials Science, Mathematics, Mechanical Engineering
    Medicine, Meteorology, Microbiology, Mining Engineering, Music, Neuroscience, Nursing, Nutrition
    Oceanography, Painting, Pharmacy, Philosophy, Photography, Physics, Political Science, Psychology
    Public Health, Sculpture, Social Work, Sociology, Spanish, Statistics, Theology, Tourism, Toxicology
    Urban Planning, Veterinary Medicine, Zoology
""")
EMPLOYERS = _products(
    """
    Acorn, Albatross, Amberline, Anvil, Arcadia, Beacon, Bluebird, Borealis, Bramble, Brightwater, Cascade
    Cobalt, Compass, Coralstone, Crestline, Daybreak, Driftwood, Emberly, Falconer, Firefly, Foxglove, Granite
    Greyhound, Halcyon, Heron, Horizon, Ironwood, Juniper, Keystone, Lantern, Lighthouse, Meridian
    Nightingale, Northstar, Obsidian, Orchard, Palisade, Quartz, Redstone, Sapphire, Skylark, Tidewater, Umbra
    Windmill
""",
    "Systems, Energy, Foods, Logistics, Capital, Motors",
    between=" ",
)[:263]  # the number of employers of bioS

ATTRIBUTES = {
    "birth_date": Attribute(
        DATES,
        statements=(
            "{name} was born on {value}.",
            "The birthday of {name} is {value}.",
            "The life of {name} began on {value}.",
            "{name} came into the world on {value}.",
            "The date of birth of {name} is {value}.",
            "{name} has been alive since {value}.",
            "The day on which {name} was born is {value}.",
            "{name} first saw the light of day on {value}.",
        ),
        questions=(
            "Question: When was {name} born? Answer: {value}.",
            "Question: What is the birthday of {name}? Answer: {value}.",
            "Question: On which day did the life of {name} begin? Answer: {value}.",
        ),
    ),
    "birth_city": Attribute(
        CITIES,
        statements=(
            "{name} was born in {value}.",
            "The birthplace of {name} is {value}.",
            "{name} is a native of {value}.",
            "The family of {name} lived at the time of the birth in {value}.",
            "{name} spent the first days of life in {value}.",
            "The city where {name} was born is {value}.",
            "{name} originally comes from {value}.",
            "The birth of {name} took place in {value}.",
        ),
        questions=(
            "Question: In which city was {name} born? Answer: {value}.",
            "Question: What is the birthplace of {name}? Answer: {value}.",
            "Question: Which city does {name} originally come from? Answer: {value}.",
        ),
    ),
    "university": Attribute(
        UNIVERSITIES,
        statements=(
            "{name} graduated from {value}.",
            "{name} attended {value}.",
            "The degree of {name} was awarded by {value}.",
            "{name} is an alumnus of {value}.",
            "{name} spent the years of study at {value}.",
            "The place where {name} studied is {value}.",
            "{name} was educated at {value}.",
            "The alma mater of {name} is {value}.",
        ),
        questions=(
            "Question: Which university did {name} attend? Answer: {value}.",
            "Question: Where did {name} study? Answer: {value}.",
            "Question: What is the alma mater of {name}? Answer: {value}.",
        ),
    ),
    "major": Attribute(
        MAJORS,
        statements=(
            "{name} majored in {value}.",
            "The field of study of {name} was {value}.",
            "{name} took a degree in {value}.",
            "The subject that {name} chose is {value}.",
            "{name} was a student of {value}.",
            "The education of {name} focused on {value}.",
            "The major of {name} was {value}.",
            "{name} devoted the years of study to {value}.",
        ),
        questions=(
            "Question: What did {name} major in? Answer: {value}.",
            "Question: In which field does {name} have a degree? Answer: {value}.",
            "Question: Which subject did {name} choose? Answer: {value}.",
        ),
    ),
    "employer": Attribute(
        EMPLOYERS,
        statements=(
            "{name} works for {value}.",
            "The employer of {name} is {value}.",
            "{name} has a job at {value}.",
            "The company that pays {name} is {value}.",
            "{name} pursued a career at {value}.",
            "The professional home of {name} is {value}.",
            "{name} is employed by {value}.",
            "The current position of {name} is with {value}.",
        ),
        questions=(
            "Question: Which company does {name} work for? Answer: {value}.",
            "Question: Who is the employer of {name}? Answer: {value}.",
            "Question: At which company is {name} employed? Answer: {value}.",
        ),
    ),
}
"""The attributes of bioS (see `data.facts`) except the pronoun. A person has one of 2^46.6 combinations."""
