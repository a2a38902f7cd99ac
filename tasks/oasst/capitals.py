"""The capitals of every country, of the states of the USA and of the states of India, as tables to be read.

Countries are the 193 members of the United Nations, its two observers (Vatican City, Palestine), and Taiwan and
Kosovo. Names are those that a question would use; regions are the five of the UN's M49 list, which puts Cyprus,
Turkey and the Caucasus in Asia. A place that official bodies place differently stands here as reference works print
it, taking no side.

The first city is the capital by law, or else in practice. After it come the answers that count as right, too: other
names of the same city, and cities that share the title (Bolivia, Eswatini, South Africa, ...). A seat of government
or parliament without the title does not count: The Hague, Putrajaya, Valparaíso. Accents and apostrophes need no
alias: `facts.is_right` does not see them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """A country or state, its capital, its region of the world, and what else is right to answer."""

    name: str
    capital: str
    region: str
    aliases: tuple[str, ...] = ()


def _places(region: str, table: str) -> tuple[Place, ...]:
    """Read lines of `name | capital | alias; alias`; the aliases may be left out."""
    rows = [[cell.strip() for cell in line.split("|")] for line in table.strip().splitlines()]
    return tuple(
        Place(name, capital, region, tuple(alias.strip() for cell in rest for alias in cell.split(";")))
        for name, capital, *rest in rows
    )


AFRICA = _places(
    "Africa",
    """
    Algeria | Algiers
    Angola | Luanda
    Benin | Porto-Novo | Cotonou
    Botswana | Gaborone
    Burkina Faso | Ouagadougou
    Burundi | Gitega | Bujumbura
    Cameroon | Yaoundé
    Cape Verde | Praia
    the Central African Republic | Bangui
    Chad | N'Djamena
    the Comoros | Moroni
    the Democratic Republic of the Congo | Kinshasa
    Djibouti | Djibouti | Djibouti City
    Egypt | Cairo
    Equatorial Guinea | Malabo | Ciudad de la Paz
    Eritrea | Asmara
    Eswatini | Mbabane | Lobamba
    Ethiopia | Addis Ababa
    Gabon | Libreville
    the Gambia | Banjul
    Ghana | Accra
    Guinea | Conakry
    Guinea-Bissau | Bissau
    Ivory Coast | Yamoussoukro | Abidjan
    Kenya | Nairobi
    Lesotho | Maseru
    Liberia | Monrovia
    Libya | Tripoli
    Madagascar | Antananarivo
    Malawi | Lilongwe
    Mali | Bamako
    Mauritania | Nouakchott
    Mauritius | Port Louis
    Morocco | Rabat
    Mozambique | Maputo
    Namibia | Windhoek
    Niger | Niamey
    Nigeria | Abuja
    the Republic of the Congo | Brazzaville
    Rwanda | Kigali
    São Tomé and Príncipe | São Tomé
    Senegal | Dakar
    Seychelles | Victoria
    Sierra Leone | Freetown
    Somalia | Mogadishu
    South Africa | Pretoria | Cape Town; Bloemfontein; Tshwane
    South Sudan | Juba
    Sudan | Khartoum
    Tanzania | Dodoma
    Togo | Lomé
    Tunisia | Tunis
    Uganda | Kampala
    Zambia | Lusaka
    Zimbabwe | Harare
    """,
)

AMERICAS = _places(
    "Americas",
    """
    Antigua and Barbuda | St. John's | Saint John's
    Argentina | Buenos Aires
    the Bahamas | Nassau
    Barbados | Bridgetown
    Belize | Belmopan
    Bolivia | Sucre | La Paz
    Brazil | Brasília
    Canada | Ottawa
    Chile | Santiago | Santiago de Chile
    Colombia | Bogotá
    Costa Rica | San José
    Cuba | Havana
    Dominica | Roseau
    the Dominican Republic | Santo Domingo
    Ecuador | Quito
    El Salvador | San Salvador
    Grenada | St. George's | Saint George's
    Guatemala | Guatemala City
    Guyana | Georgetown
    Haiti | Port-au-Prince
    Honduras | Tegucigalpa
    Jamaica | Kingston
    Mexico | Mexico City
    Nicaragua | Managua
    Panama | Panama City
    Paraguay | Asunción
    Peru | Lima
    Saint Kitts and Nevis | Basseterre
    Saint Lucia | Castries
    Saint Vincent and the Grenadines | Kingstown
    Suriname | Paramaribo
    Trinidad and Tobago | Port of Spain
    the United States | Washington, D.C. | Washington
    Uruguay | Montevideo
    Venezuela | Caracas
    """,
)

ASIA = _places(
    "Asia",
    """
    Afghanistan | Kabul
    Armenia | Yerevan
    Azerbaijan | Baku
    Bahrain | Manama
    Bangladesh | Dhaka | Dacca
    Bhutan | Thimphu
    Brunei | Bandar Seri Begawan
    Cambodia | Phnom Penh
    China | Beijing | Peking
    Cyprus | Nicosia
    East Timor | Dili
    Georgia | Tbilisi
    India | New Delhi | Delhi
    Indonesia | Jakarta
    Iran | Tehran | Teheran
    Iraq | Baghdad
    Israel | Jerusalem
    Japan | Tokyo
    Jordan | Amman
    Kazakhstan | Astana | Nur-Sultan
    Kuwait | Kuwait City
    Kyrgyzstan | Bishkek
    Laos | Vientiane
    Lebanon | Beirut
    Malaysia | Kuala Lumpur
    the Maldives | Malé
    Mongolia | Ulaanbaatar | Ulan Bator
    Myanmar | Naypyidaw | Nay Pyi Taw
    Nepal | Kathmandu
    North Korea | Pyongyang
    Oman | Muscat
    Pakistan | Islamabad
    Palestine | Ramallah | East Jerusalem
    the Philippines | Manila
    Qatar | Doha
    Saudi Arabia | Riyadh
    Singapore | Singapore
    South Korea | Seoul
    Sri Lanka | Sri Jayawardenepura Kotte | Sri Jayewardenepura Kotte; Kotte; Colombo
    Syria | Damascus
    Taiwan | Taipei
    Tajikistan | Dushanbe
    Thailand | Bangkok
    Turkey | Ankara
    Turkmenistan | Ashgabat
    the United Arab Emirates | Abu Dhabi
    Uzbekistan | Tashkent
    Vietnam | Hanoi
    Yemen | Sanaa | Aden
    """,
)

EUROPE = _places(
    "Europe",
    """
    Albania | Tirana
    Andorra | Andorra la Vella
    Austria | Vienna
    Belarus | Minsk
    Belgium | Brussels
    Bosnia and Herzegovina | Sarajevo
    Bulgaria | Sofia
    Croatia | Zagreb
    the Czech Republic | Prague
    Denmark | Copenhagen
    Estonia | Tallinn
    Finland | Helsinki
    France | Paris
    Germany | Berlin
    Greece | Athens
    Hungary | Budapest
    Iceland | Reykjavik
    Ireland | Dublin
    Italy | Rome
    Kosovo | Pristina | Prishtina
    Latvia | Riga
    Liechtenstein | Vaduz
    Lithuania | Vilnius
    Luxembourg | Luxembourg | Luxembourg City
    Malta | Valletta
    Moldova | Chișinău | Kishinev
    Monaco | Monaco | Monaco City; Monaco-Ville
    Montenegro | Podgorica
    the Netherlands | Amsterdam
    North Macedonia | Skopje
    Norway | Oslo
    Poland | Warsaw
    Portugal | Lisbon
    Romania | Bucharest
    Russia | Moscow
    San Marino | San Marino | City of San Marino
    Serbia | Belgrade
    Slovakia | Bratislava
    Slovenia | Ljubljana
    Spain | Madrid
    Sweden | Stockholm
    Switzerland | Bern | Berne
    Ukraine | Kyiv | Kiev
    the United Kingdom | London
    Vatican City | Vatican City
    """,
)

OCEANIA = _places(
    "Oceania",
    """
    Australia | Canberra
    Fiji | Suva
    Kiribati | South Tarawa | Tarawa
    the Marshall Islands | Majuro
    Micronesia | Palikir
    Nauru | Yaren
    New Zealand | Wellington
    Palau | Ngerulmud
    Papua New Guinea | Port Moresby
    Samoa | Apia
    the Solomon Islands | Honiara
    Tonga | Nuku'alofa
    Tuvalu | Funafuti
    Vanuatu | Port Vila
    """,
)

COUNTRIES = AFRICA + AMERICAS + ASIA + EUROPE + OCEANIA

# Three states are named with care: Georgia is also a country, Washington a city, Punjab a province of Pakistan, too.
US_STATES = _places(
    "Americas",
    """
    Alabama | Montgomery
    Alaska | Juneau
    Arizona | Phoenix
    Arkansas | Little Rock
    California | Sacramento
    Colorado | Denver
    Connecticut | Hartford
    Delaware | Dover
    Florida | Tallahassee
    the U.S. state of Georgia | Atlanta
    Hawaii | Honolulu
    Idaho | Boise
    Illinois | Springfield
    Indiana | Indianapolis
    Iowa | Des Moines
    Kansas | Topeka
    Kentucky | Frankfort
    Louisiana | Baton Rouge
    Maine | Augusta
    Maryland | Annapolis
    Massachusetts | Boston
    Michigan | Lansing
    Minnesota | Saint Paul | St. Paul
    Mississippi | Jackson
    Missouri | Jefferson City
    Montana | Helena
    Nebraska | Lincoln
    Nevada | Carson City
    New Hampshire | Concord
    New Jersey | Trenton
    New Mexico | Santa Fe
    New York | Albany
    North Carolina | Raleigh
    North Dakota | Bismarck
    Ohio | Columbus
    Oklahoma | Oklahoma City
    Oregon | Salem
    Pennsylvania | Harrisburg
    Rhode Island | Providence
    South Carolina | Columbia
    South Dakota | Pierre
    Tennessee | Nashville
    Texas | Austin
    Utah | Salt Lake City
    Vermont | Montpelier
    Virginia | Richmond
    Washington state | Olympia
    West Virginia | Charleston
    Wisconsin | Madison
    Wyoming | Cheyenne
    """,
)

INDIAN_STATES = _places(
    "Asia",
    """
    Andhra Pradesh | Amaravati
    Arunachal Pradesh | Itanagar
    Assam | Dispur | Guwahati
    Bihar | Patna
    Chhattisgarh | Raipur | Naya Raipur; Nava Raipur
    Goa | Panaji | Panjim
    Gujarat | Gandhinagar
    Haryana | Chandigarh
    Himachal Pradesh | Shimla | Dharamshala
    Jharkhand | Ranchi
    Karnataka | Bengaluru | Bangalore
    Kerala | Thiruvananthapuram | Trivandrum
    Madhya Pradesh | Bhopal
    Maharashtra | Mumbai | Bombay; Nagpur
    Manipur | Imphal
    Meghalaya | Shillong
    Mizoram | Aizawl
    Nagaland | Kohima
    Odisha | Bhubaneswar | Bhubaneshwar
    the Indian state of Punjab | Chandigarh
    Rajasthan | Jaipur
    Sikkim | Gangtok
    Tamil Nadu | Chennai | Madras
    Telangana | Hyderabad
    Tripura | Agartala
    Uttar Pradesh | Lucknow
    Uttarakhand | Dehradun | Gairsain; Bhararisain
    West Bengal | Kolkata | Calcutta
    """,
)

# Language: the question, the end of the reply, and twelve countries as that question wants them.
IN_OTHER_LANGUAGES = {
    "de": (
        "Was ist die Hauptstadt von {}?",
        ".",
        "Frankreich=Paris Spanien=Madrid Italien=Rom Deutschland=Berlin Japan=Tokio China=Peking "
        "Russland=Moskau Polen=Warschau Portugal=Lissabon Griechenland=Athen Ägypten=Kairo Kanada=Ottawa",
    ),
    "es": (
        "¿Cuál es la capital de {}?",
        ".",
        "Francia=París España=Madrid Italia=Roma Alemania=Berlín Japón=Tokio China=Pekín Rusia=Moscú "
        "Polonia=Varsovia Portugal=Lisboa Grecia=Atenas Egipto=El_Cairo Canadá=Ottawa",
    ),
    "fr": (
        "Quelle est la capitale {} ?",
        ".",
        "de_la_France=Paris de_l'Espagne=Madrid de_l'Italie=Rome de_l'Allemagne=Berlin du_Japon=Tokyo "
        "de_la_Chine=Pékin de_la_Russie=Moscou de_la_Pologne=Varsovie du_Portugal=Lisbonne "
        "de_la_Grèce=Athènes de_l'Égypte=Le_Caire du_Canada=Ottawa",
    ),
    "it": (
        "Qual è la capitale {}?",
        ".",
        "della_Francia=Parigi della_Spagna=Madrid dell'Italia=Roma della_Germania=Berlino "
        "del_Giappone=Tokyo della_Cina=Pechino della_Russia=Mosca della_Polonia=Varsavia "
        "del_Portogallo=Lisbona della_Grecia=Atene dell'Egitto=Il_Cairo del_Canada=Ottawa",
    ),
    "pt-BR": (
        "Qual é a capital {}?",
        ".",
        "da_França=Paris da_Espanha=Madri da_Itália=Roma da_Alemanha=Berlim do_Japão=Tóquio da_China=Pequim "
        "da_Rússia=Moscou da_Polônia=Varsóvia de_Portugal=Lisboa da_Grécia=Atenas do_Egito=Cairo "
        "do_Canadá=Ottawa",
    ),
    "ru": (
        "Назовите столицу {}.",
        ".",
        "Франции=Париж Испании=Мадрид Италии=Рим Германии=Берлин Японии=Токио Китая=Пекин России=Москва "
        "Польши=Варшава Португалии=Лиссабон Греции=Афины Египта=Каир Канады=Оттава",
    ),
    "ja": (
        "{}の首都はどこですか?",
        "。",
        "フランス=パリ スペイン=マドリード イタリア=ローマ ドイツ=ベルリン 日本=東京 中国=北京 "
        "ロシア=モスクワ ポーランド=ワルシャワ ポルトガル=リスボン ギリシャ=アテネ エジプト=カイロ "
        "カナダ=オタワ",
    ),
    "zh": (
        "{}的首都是哪里？",
        "。",
        "法国=巴黎 西班牙=马德里 意大利=罗马 德国=柏林 日本=东京 中国=北京 俄罗斯=莫斯科 波兰=华沙 "
        "葡萄牙=里斯本 希腊=雅典 埃及=开罗 加拿大=渥太华",
    ),
}
